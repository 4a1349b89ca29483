"""What every setting and every variant's settings share."""

from __future__ import annotations

from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Group(str, Enum):
    """The part of the form in which a setting stands."""

    GATE = "gate"
    SCALE = "scale"
    BUDGET = "budget"
    ROUTING = "routing"
    APPROXIMATION = "approximation"
    LOCAL = "local"
    GLOBAL = "global"
    STABILITY = "stability"
    MEMORY = "memory"
    QUALITY = "quality"
    TUNING = "tuning"
    CAPTURE = "capture"
    TRAINING = "training"
    CHECKPOINT = "checkpoint"


GROUP_TITLES: dict[Group, str] = {
    Group.GATE: "Gates: where the variant runs",
    Group.SCALE: "Scale: shaping of query and key",
    Group.BUDGET: "Budget: how much error is allowed",
    Group.ROUTING: "Candidates, and what is measured of them",
    Group.APPROXIMATION: "Approximation",
    Group.LOCAL: "Local: what is exact",
    Group.GLOBAL: "Global: what is approximated",
    Group.STABILITY: "Stability and fallback",
    Group.MEMORY: "Memory",
    Group.QUALITY: "Quality measurement",
    Group.TUNING: "Auto-tune: search for the shaping",
    Group.CAPTURE: "Capture: query, key and value to files",
    Group.TRAINING: "Training",
    Group.CHECKPOINT: "Checkpoint and export",
}


def setting(
    default: Any,
    group: Group,
    help: str,
    *,
    title: str | None = None,
    unit: str = "",
    live: bool = True,
    step: float | None = None,
    advanced: bool = False,
    node_only: bool = False,
    **limits: Any,
) -> Any:
    """Declare one setting.

    Args:
        default: value of a fresh node.
        group: part of the form.
        help: what it does, and what to expect of its extremes; shown as the form's help.
        title: label; the name with blanks where left out.
        unit: unit of the value ("tokens", "sigma"), empty for a plain number.
        live: whether a running sampler can take it up between two steps; otherwise it waits for
            the next run.
        step: increment of the form's and the node's spinner.
        advanced: folded away at first.
        node_only: whether only the node may set it and no page: names of files and accounts.
        limits: pydantic's own limits (``ge``, ``le``, ``gt``, ``lt``).
    """
    extra: dict[str, Any] = {
        "group": group.value,
        "unit": unit,
        "live": live,
        "advanced": advanced,
    }
    if step is not None:
        extra["step"] = step
    if node_only:
        extra["node_only"] = True
    return Field(default, title=title, description=help, json_schema_extra=extra, **limits)


class VariantSettings(BaseModel):
    """Base of a variant's settings: unknown names are errors and instances never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        field_title_generator=lambda name, _: name.replace("_", " "),
    )

    @classmethod
    def live_names(cls) -> frozenset[str]:
        """Names of the settings that a running sampler can take up."""
        return frozenset(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["live"]
        )

    @classmethod
    def node_only_names(cls) -> frozenset[str]:
        """Names of the settings that the node alone sets."""
        return frozenset(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict)
            and field.json_schema_extra.get("node_only")
        )

    def with_own_of(self, node: VariantSettings) -> VariantSettings:
        """The same with the node's own values of what it alone sets."""
        return self.model_copy(
            update={name: getattr(node, name) for name in self.node_only_names()}
        )

    def changed_from(self, other: VariantSettings) -> dict[str, tuple[Any, Any]]:
        """Settings that differ, as ``{name: (value in other, value in self)}``."""
        before, after = other.model_dump(mode="json"), self.model_dump(mode="json")
        return {name: (before[name], after[name]) for name in after if before[name] != after[name]}

    def measures(self, step: int, layer: int) -> bool:
        """Whether a layer is measured at a step; settings that don't say so measure nothing.

        Args:
            step: index into the schedule, from 0.
            layer: place among the model's layers, from 0.
        """
        return False


LAYERS_TOGETHER = 8
"""Layers that are measured at the same steps. A step that measures at all launches the operators
of its statistics once, so that a few layers cost about as much as one."""


class Measured(VariantSettings):
    """What every variant measures besides its own output."""

    quality_samples: int = setting(
        16,
        Group.QUALITY,
        "Queries sampled per call for quality and q·k statistics; the latter look at 64 of the "
        "keys, so they are estimates, percentiles above all. More cost more time and give "
        "steadier figures; 0 measures nothing.",
        unit="queries",
        ge=0,
        le=1024,
    )
    quality_every: int = setting(
        4,
        Group.QUALITY,
        "Measure each layer at every n-th step only: eight layers at one step, the next eight at "
        "the next, and again from the first after n. Between, a layer shows no quality and no "
        "q·k statistics; 1 measures every layer at every step.",
        unit="steps",
        ge=1,
        le=1000,
    )
    quality_seed: int = setting(
        0,
        Group.QUALITY,
        "Seed of the sampled queries. It stays fixed during a run, so that steps compare.",
        live=False,
        advanced=True,
        ge=0,
        le=2**31 - 1,
    )

    def measures(self, step: int, layer: int) -> bool:
        """Whether it is the layer's turn."""
        turn = step - layer // LAYERS_TOGETHER
        return self.quality_samples > 0 and turn % self.quality_every == 0
