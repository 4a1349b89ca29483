"""What the layers did in one step: gathered on the device, read once, told as one message.

The sampler's thread appends to a `StepLog`. When the step closes, everything that lies on a GPU
is copied to the host in one piece, without waiting; the link's thread folds the calls of each
layer into one row when the copy has arrived.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention.clock import Clock
from ..attention.metrics import BY_NAME, Fold
from ..wire import LayerColumns, ReasonCount, StepClosed
from .pool import SamplePool

log = logging.getLogger("attnscope")

UNKNOWN_LAYER = "unknown.0"
"""Stands for the calls of a model that doesn't say which block calls."""


@dataclass(slots=True)
class CallRecord:
    """One attention call.

    Attributes:
        layer: name of the block.
        made_by_variant: whether the variant's output was used.
        kind: "gate" or "fallback" where exact attention ran in the variant's place, "choice" where
            a variant was chosen among several, else empty.
        reason: which gate, fallback or choice.
        detail: the same for people.
        tokens_q: query tokens.
        tokens_k: key tokens.
        stats: metric name to a number or a 0-dimensional tensor.
        start: clock's mark before the call; None where calls aren't timed.
        end: clock's mark after it.
        made_by: which variant made the output, where the run's own leaves that to others.
    """

    layer: str
    made_by_variant: bool
    kind: str
    reason: str
    detail: str
    tokens_q: int
    tokens_k: int
    stats: dict[str, Any]
    start: Any = None
    end: Any = None
    made_by: str = ""


@dataclass(slots=True)
class StepLog:
    """A step that is running. Its lists are only appended to, by any thread that samples."""

    step: int
    sigma: float | None
    revision: int
    start: Any
    calls: list[CallRecord] = field(default_factory=list)
    samples: SamplePool = field(default_factory=SamplePool)
    model_calls: int = 0


def fold(how: Fold, values: Sequence[float]) -> float:
    """One number of several; a NaN among them stays one."""
    if len(values) == 1:
        # Most layers are called once a step, and a step has a hundred numbers and more.
        return values[0]
    if any(math.isnan(value) for value in values):
        return math.nan
    if how is Fold.MIN:
        return min(values)
    if how is Fold.MAX:
        return max(values)
    total = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    return total if how is Fold.SUM else total / len(values)


class _HostCopy:
    """0-dimensional tensors of one device on their way to the host, in one copy."""

    def __init__(self, tensors: list[torch.Tensor], clock: Clock) -> None:
        self._clock = clock
        self._arrival: Any = None
        self._tensors: list[torch.Tensor] = tensors
        self._host: torch.Tensor | None = None
        if tensors and tensors[0].device.type == "cuda":
            stacked = torch.stack([t if t.dtype == torch.float32 else t.float() for t in tensors])
            self._host = torch.empty(stacked.shape, dtype=torch.float32, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._arrival = clock.mark()
            self._tensors = []

    def arrived(self) -> bool:
        return self._arrival is None or self._clock.reached(self._arrival)

    def values(self) -> list[float]:
        if self._host is not None:
            return self._host.tolist()
        return [float(tensor) for tensor in self._tensors]


class ClosedStep:
    """A step that is over, on its way to becoming a `StepClosed`."""

    droppable = True
    urgent = True

    def __init__(
        self,
        run_id: str,
        variant: str,
        log: StepLog,
        clock: Clock,
        order: Sequence[str],
        report: Callable[[StepClosed], None] | None = None,
    ) -> None:
        """
        Args:
            run_id: of the run.
            variant: its name, as the path of the layers where it made the output.
            log: the step; nothing is appended to it from now on.
            clock: of the sampling device.
            order: the model's layers in the order in which they run.
            report: is told of the step when it is built.
        """
        self._report = report
        self.run_id = run_id
        self.at = time.time()
        self._variant = variant
        self._log = log
        self._clock = clock
        self._order = order
        self._end = clock.mark()
        log.samples.settle()
        self._slots: list[tuple[int, str]] = []
        tensors: list[torch.Tensor] = []
        for index, call in enumerate(log.calls):
            for name, value in call.stats.items():
                if isinstance(value, torch.Tensor):
                    self._slots.append((index, name))
                    tensors.append(value)
        self._copy = _HostCopy(tensors, clock)

    def ready(self) -> bool:
        """Whether everything has arrived on the host. Never waits."""
        return self._copy.arrived() and self._clock.reached(self._end)

    def build(self, seq: int) -> StepClosed:
        """The message; only when `ready`."""
        step = self._log
        for (index, name), value in zip(self._slots, self._copy.values(), strict=True):
            step.calls[index].stats[name] = value
        rows = self._rows(step.calls)
        closed = StepClosed(
            run_id=self.run_id,
            seq=seq,
            at=self.at,
            step=step.step,
            sigma=math.nan if step.sigma is None else step.sigma,
            model_calls=step.model_calls,
            duration_ms=self._clock.elapsed_ms(step.start, self._end),
            revision=step.revision,
            layers=self._columns(rows),
            reasons=list(self._reasons(rows)),
        )
        if self._report is not None:
            try:
                self._report(closed)
            except Exception:
                # A line of the log must not cost the step.
                log.exception("AttnScope: a step could not be summed up")
        return closed

    def _rows(self, calls: Iterable[CallRecord]) -> list[tuple[str, list[CallRecord]]]:
        by_layer: dict[str, list[CallRecord]] = {}
        for call in calls:
            by_layer.setdefault(call.layer, []).append(call)
        place = {layer: index for index, layer in enumerate(self._order)}
        # Layers that the model didn't announce keep the order in which they were seen.
        return sorted(by_layer.items(), key=lambda row: place.get(row[0], len(place)))

    def _columns(self, rows: list[tuple[str, list[CallRecord]]]) -> LayerColumns:
        metrics: dict[str, list[float | None]] = {}
        for index, (_, calls) in enumerate(rows):
            for name, values in self._measured(calls).items():
                column = metrics.setdefault(name, [None] * len(rows))
                column[index] = fold(BY_NAME[name].fold, values)
        return LayerColumns(
            layer=[layer for layer, _ in rows],
            path=[self._path(calls) for _, calls in rows],
            calls=[len(calls) for _, calls in rows],
            calls_variant=[sum(call.made_by_variant for call in calls) for _, calls in rows],
            calls_gated=[sum(call.kind == "gate" for call in calls) for _, calls in rows],
            calls_fallback=[sum(call.kind == "fallback" for call in calls) for _, calls in rows],
            tokens_q=[max(call.tokens_q for call in calls) for _, calls in rows],
            tokens_k=[max(call.tokens_k for call in calls) for _, calls in rows],
            metrics=metrics,
        )

    def _measured(self, calls: Sequence[CallRecord]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for call in calls:
            for name, value in call.stats.items():
                if name in BY_NAME:
                    found.setdefault(name, []).append(float(value))
            if call.start is not None:
                elapsed = self._clock.elapsed_ms(call.start, call.end)
                found.setdefault("attn_ms", []).append(elapsed)
        return found

    def _path(self, calls: Sequence[CallRecord]) -> str:
        made = {
            (call.made_by or self._variant) if call.made_by_variant else "exact" for call in calls
        }
        return made.pop() if len(made) == 1 else "mixed"

    def _reasons(self, rows: list[tuple[str, list[CallRecord]]]) -> Iterable[ReasonCount]:
        for layer, calls in rows:
            counts: dict[tuple[str, str], int] = {}
            details: dict[tuple[str, str], str] = {}
            for call in calls:
                if call.kind:
                    which = (call.kind, call.reason)
                    counts[which] = counts.get(which, 0) + 1
                    details[which] = call.detail or details.get(which, "")
            for (kind, reason), count in counts.items():
                yield ReasonCount(
                    layer=layer,
                    kind=kind,
                    reason=reason,
                    count=count,
                    detail=details[kind, reason][:500],
                )
