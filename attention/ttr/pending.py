"""Updates whose numbers are still on the device, and how they are read: many at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .replay import KeptCall
from .runtime import Layer
from .trainer import Made


@dataclass(slots=True)
class Pending:
    """An update whose numbers are still on the device."""

    layer: Layer
    step: int
    at: float
    made: Made
    measured: dict[str, torch.Tensor]
    stopwatch: Stopwatch
    held_bytes: int
    replay_bytes: int
    source: KeptCall | None

    def tensors(self) -> list[torch.Tensor]:
        made = self.made
        first = (made.loss, made.gradient_norm, made.teacher_finite, made.finite)
        return [tensor.float() for tensor in (*first, *self.measured.values())]


class Stopwatch:
    """Seconds of an update, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._mark()
        self._end = self._start

    def stop(self) -> None:
        self._end = self._mark()

    @property
    def seconds(self) -> float:
        """After the device has come to the end."""
        if self._device.type == "cuda":
            return float(self._start.elapsed_time(self._end)) / 1e3
        return float(self._end - self._start)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def read(pending: Sequence[Pending]) -> list[list[float]]:
    """Everything that waits, in one copy to the host for each device."""
    tensors = [one.tensors() for one in pending]
    flat: dict[torch.device, list[torch.Tensor]] = {}
    for group in tensors:
        flat.setdefault(group[0].device, []).extend(group)
    values = {device: iter(torch.stack(some).tolist()) for device, some in flat.items()}
    return [[next(values[group[0].device]) for _ in group] for group in tensors]
