"""What a variant is: a name, its settings, a gate, and an attention call with its statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .clock import Clock
from .distillation import Listener
from .reasons import Choice, Fallback, Gate
from .settings import VariantSettings
from .token_layout import TokenLayout

if TYPE_CHECKING:
    from .router.table import TableStore


@dataclass(frozen=True, slots=True)
class LayerId:
    """A transformer block: its kind and its index within that kind."""

    block_type: str
    block_index: int

    def __str__(self) -> str:
        return f"{self.block_type}.{self.block_index}"


Reserve = Callable[[int, torch.device], None]
"""Asks whoever manages a device's memory to make room for so many bytes."""

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Exact attention, without a mask and at the call's scale: ``[B, H, n, D]``, ``[B, H, Nk, D]`` and
``[B, H, Nk, Dv]`` to ``[B, H, n, Dv]``."""


@dataclass(frozen=True, slots=True)
class ModelPrint:
    """The sampled model, as what is kept of it knows it again.

    Attributes:
        name: for people and file names: the model's file or class.
        weights: hash of a sample of its weights; another model has another. Empty: unknown.
    """

    name: str
    weights: str = ""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a variant may prepare for before the first call.

    Attributes:
        sigmas: the schedule, one more value than there are steps.
        layers: the model's layers in the order in which they run; empty where unknown.
        reserve: for a variant that is about to allocate much; None where nobody listens.
        settings: that the run begins with; None for the variant's defaults.
        model: that is sampled; None where unknown.
        folder: absolute, for what the variant keeps on disk; None where there is none.
        listener: of a variant that learns; None where nobody listens.
        clock: of the device that samples; None where nothing is timed.
        tables: where a router finds and leaves its measurements; None keeps them for the run.
    """

    sigmas: Sequence[float]
    layers: Sequence[LayerId] = ()
    reserve: Reserve | None = None
    settings: VariantSettings | None = None
    model: ModelPrint | None = None
    folder: Path | None = None
    listener: Listener | None = None
    clock: Clock | None = None
    tables: TableStore | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call.

    Attributes:
        settings: in force for the whole step.
        layer: the block that calls; None where the model doesn't say.
        sigma: noise level of the call; None where unknown.
        step: index into the schedule, from 0.
        scale: factor on q·k.
        mask: boolean (True: attend) or additive float, broadcastable to ``[B, H, Nq, Nk]``.
        log_mass_rows: ``[S]`` int64 on the query's device, the queries whose ``log_mass`` the
            result shall hold; None for none, which costs nothing.
        layout: where the tokens stand, text first; None where it isn't certain or query and key
            are of different tokens.
        pre_rope: query and key before rotary embedding, each shaped like the call's own; None
            where they are not to be had. Only for variants that ask for it.
    """

    settings: VariantSettings
    layer: LayerId | None
    sigma: float | None
    step: int
    scale: float
    mask: torch.Tensor | None = None
    log_mass_rows: torch.Tensor | None = None
    layout: TokenLayout | None = None
    pre_rope: tuple[torch.Tensor, torch.Tensor] | None = None
    dense: Dense | None = None


@dataclass(frozen=True, slots=True)
class Effective:
    """The attention that an output approximates.

    Attributes:
        query: ``[B, H, Nq, D]``.
        key: ``[B, H, Nk, D]``.
        scale: factor on q·k.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Tuning:
    """Settings that a variant has found for itself, and what they are worth.

    Attributes:
        settings: complete.
        score_before: of the settings before; lower is better.
        score_after: of these settings, on the same calls.
        detail: for people: what was compared, and how.
    """

    settings: VariantSettings
    score_before: float
    score_after: float
    detail: str


Afterwards = Callable[[Any, Any], None]
"""Takes the clock's marks before and after a call; both None where calls aren't timed."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call.

    Attributes:
        out: ``[B, H, Nq, D]`` in the query's dtype; None where exact attention has to run.
        fallback: why, where ``out`` is None. With neither, exact attention is what the variant
            is for.
        detail: the same for people, such as the refused feature dimension.
        stats: metric name to a number or a 0-dimensional tensor. Tensors stay on their device
            and are read when the step closes, so that no call waits for the device.
        log_mass: ``[B, H, S]`` float32, log of the softmax denominator that the output stands
            for at the call's ``log_mass_rows``, comparable to logsumexp of the scaled logits;
            None where the call wants none or the variant has no such number.
        effective: where the variant approximates another attention than the call's own, such as
            one with shaped query and key; None where it is the call's own.
        gate: the rule that kept the variant from the call, where that could not be told without
            its tensors; ``out`` is None then.
        made_by: name of the variant that made the output, where that is another one.
        choice: why it was that one; ``detail`` says more.
        afterwards: is called once the call's output is there, whoever made it, and the call's
            time is taken: for measurements, which are not part of the call.
    """

    out: torch.Tensor | None
    fallback: Fallback | None = None
    detail: str = ""
    stats: dict[str, torch.Tensor | float] = field(default_factory=dict)
    log_mass: torch.Tensor | None = None
    effective: Effective | None = None
    gate: Gate | None = None
    made_by: str = ""
    choice: Choice | None = None
    afterwards: Afterwards | None = None


class Variant(ABC):
    """An attention that can stand in for the exact one. One object serves one run."""

    name: ClassVar[str]
    title: ClassVar[str]
    settings_model: ClassVar[type[VariantSettings]]
    wants_pre_rope: bool = False
    """Whether calls shall hold ``pre_rope``, for which the plugin patches bindings of ComfyUI."""
    times_calls: ClassVar[bool] = False
    """Whether calls are to be timed even where nothing is recorded."""
    attends: ClassVar[bool] = True
    """Whether there are calls that it answers itself; if not, it is asked about none."""
    tells_log_mass: ClassVar[bool] = False
    """Whether results can hold a ``log_mass``; if not, calls name no ``log_mass_rows``."""
    learns: ClassVar[bool] = False
    """Whether it can learn from the model's own attention; if not, `wants` is never asked."""

    def prepare(self, run: RunInfo) -> None:  # noqa: B027
        """Called once, before the first call of the run."""

    @abstractmethod
    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        """The rule that keeps the variant from this call; None where it is due."""

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        """Attend.

        Args:
            query: ``[B, H, Nq, D]``, any floating dtype, after rotary embedding.
            key: ``[B, H, Nk, D]``.
            value: ``[B, H, Nk, D]``.
            call: settings, place and mask.
        """

    def wants(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> bool:
        """Whether `observe` shall be called for this call: asked after `gate`."""
        return False

    def observe(  # noqa: B027
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        call: Call,
    ) -> None:
        """Learn from what the model's own attention made of a call.

        Nothing that is raised here reaches the sampler, and nothing may be changed in place.

        Args:
            query: ``[B, H, Nq, D]``, see `attend`.
            key: ``[B, H, Nk, D]``.
            value: ``[B, H, Nk, Dv]``.
            out: ``[B, H, Nq, Dv]``; of another node's attention where one stands in.
            call: as `attend` has it.
        """

    def finish(self) -> None:  # noqa: B027
        """Called once, after the last call of the run, however it ended."""

    def retune(self, settings: VariantSettings) -> Tuning | None:
        """Called between two steps, where waiting for the device is allowed.

        Args:
            settings: in force for the step that begins, unless others are returned.

        Returns:
            Settings to go on with; None to change nothing.
        """
        return None

    def close(self, completed: bool) -> None:  # noqa: B027
        """Called once, after the run's last call; waiting for the device is allowed.

        Args:
            completed: whether all steps have run.
        """

    @classmethod
    def needs_pre_rope(cls, settings: VariantSettings) -> bool:
        """Whether a run with these settings will want ``pre_rope``."""
        return cls.wants_pre_rope

    @classmethod
    @abstractmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        settings: VariantSettings,
        layout: TokenLayout | None = None,
    ) -> float:
        """Floating-point operations of a call, a multiply-add counted as two.

        An estimate by the arithmetic alone: products of matrices and of features, not memory,
        exponentials or divisions.

        Args:
            query_shape: ``(B, H, Nq, D)``.
            key_shape: ``(B, H, Nk, D)``; the value is taken to have the same.
            settings: of the variant's own model.
            layout: of the tokens; None where it isn't known.

        Raises:
            ValueError: the settings don't fit the shapes, or the cost depends on a layout.
        """


def exact_flops(query_shape: Sequence[int], key_shape: Sequence[int]) -> float:
    """4·Nq·Nk·D per head: q·k and weights·v, a multiply-add counted as two."""
    batch, heads, queries, head_dim = query_shape
    return 4.0 * batch * heads * queries * key_shape[2] * head_dim
