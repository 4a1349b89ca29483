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

    def changed_from(self, other: VariantSettings) -> dict[str, tuple[Any, Any]]:
        """Settings that differ, as ``{name: (value in other, value in self)}``."""
        before, after = other.model_dump(mode="json"), self.model_dump(mode="json")
        return {name: (before[name], after[name]) for name in after if before[name] != after[name]}


def reserve_setting() -> Any:
    """Of a variant that asks for room: whether to ask."""
    return setting(
        True,
        Group.MEMORY,
        "Before the first call of each shape ask ComfyUI to make room for what the call will "
        "need, which unloads models that this sampling doesn't use.",
    )


def reserve_factor_setting() -> Any:
    """Of a variant that asks for room: how much more than the estimate."""
    return setting(
        1.1,
        Group.MEMORY,
        "Room asked for, as a multiple of the estimate.",
        ge=1.0,
        le=4.0,
        step=0.05,
        advanced=True,
    )


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
        1,
        Group.QUALITY,
        "Measure at every n-th step only. Steps between show no quality and no q·k statistics.",
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
