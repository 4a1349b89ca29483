"""Time on the device that does the work, read only after the work is done.

A clock's marks are taken by the sampler's thread and cost it no waiting; the time between two of
them is read later, by the thread that builds the message.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from ..attention.clock import Clock


class HostClock:
    """For a device whose work is done when the call returns: the CPU."""

    def __init__(self, measures_calls: bool = True) -> None:
        self.measures_calls = measures_calls

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_ms(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def reached(self, mark: float) -> bool:
        return True


class CudaClock:
    """CUDA events on the stream that is current where the mark is taken."""

    measures_calls = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def reached(self, mark: Any) -> bool:
        return bool(mark.query())


def clock_for(device: torch.device) -> Clock:
    """The clock of a device. Elsewhere than on CPU and CUDA only whole steps are timed."""
    if device.type == "cuda":
        return CudaClock(device)
    return HostClock(measures_calls=device.type == "cpu")
