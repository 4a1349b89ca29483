"""Numbers that a device computed at an earlier step, without ever waiting for them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

_KEPT = 4
"""Steps whose numbers are kept per layer; a device that lags further behind is read late."""


class HostNumber:
    """A 0-dimensional tensor on its way to the host."""

    def __init__(self, number: torch.Tensor) -> None:
        """Starts the copy, in the order of the current stream; pinned memory makes it one that
        the host doesn't wait for."""
        self._event: Any = None
        self._host = number
        if number.device.type == "cuda":
            self._host = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(number.device))

    @property
    def arrived(self) -> bool:
        """Whether `value` can be read without waiting."""
        return self._event is None or bool(self._event.query())

    @property
    def value(self) -> float:
        return float(self._host)


@dataclass(slots=True)
class _Step:
    step: int
    numbers: list[HostNumber] = field(default_factory=list)

    @property
    def arrived(self) -> bool:
        return all(number.arrived for number in self.numbers)


class WorstByLayer:
    """The largest number that each layer posted at the newest step that is over and on the host.

    Numbers of the running step never count, so that the calls of a step decide alike.
    """

    def __init__(self) -> None:
        self._steps: dict[str, deque[_Step]] = {}

    def post(self, layer: str, step: int, number: torch.Tensor) -> None:
        """Take a 0-dimensional tensor of a layer's call."""
        steps = self._steps.setdefault(layer, deque(maxlen=_KEPT))
        if not steps or steps[-1].step != step:
            steps.append(_Step(step))
        steps[-1].numbers.append(HostNumber(number))

    def worst(self, layer: str, step: int) -> float | None:
        """The largest number; None where there is none yet.

        Args:
            layer: that calls.
            step: that runs.
        """
        for entry in reversed(self._steps.get(layer, ())):
            if entry.step < step and entry.arrived:
                return max(number.value for number in entry.numbers)
        return None

    def clear(self) -> None:
        """Forget everything."""
        self._steps.clear()
