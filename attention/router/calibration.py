"""Errors and times of a run's calls: taken on the device, read between two steps."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from ..clock import Clock
from .bins import head_groups
from .table import Cell, Scores, Timed


@dataclass(frozen=True, slots=True)
class Rows:
    """Exact attention of a few queries.

    Attributes:
        indices: ``[S]`` int64.
        out: ``[B, H, S, Dv]`` float32.
    """

    indices: torch.Tensor
    out: torch.Tensor


def error_sums(out: torch.Tensor, exact: Rows) -> torch.Tensor:
    """Σ (out - exact)² and Σ exact² of each head, over batch, sampled queries and channels.

    Args:
        out: ``[B, H, Nq, Dv]``, any floating dtype.
        exact: of some of its queries.

    Returns:
        ``[2, H]`` float32, on the output's device.
    """
    some = out.index_select(2, exact.indices).float()
    error = (some - exact.out).square_().sum(dim=(0, 2, 3))
    return torch.stack([error, exact.out.square().sum(dim=(0, 2, 3))])


def error_row(sums: list[list[float]]) -> list[float]:
    """NMSE of the layer, then of each group of heads, from what `error_sums` gave."""
    error, energy = sums
    row = [_ratio(sum(error), sum(energy))]
    for heads in head_groups(len(error)):
        part = slice(heads.start, heads.stop)
        row.append(_ratio(sum(error[part]), sum(energy[part])))
    return row


def _ratio(error: float, energy: float) -> float:
    if energy > 0.0:
        return error / energy
    return 0.0 if error == 0.0 else float("inf")


class Calibration:
    """What one run measures. Calls add to it from any thread; `settle` waits for the device."""

    def __init__(self, clock: Clock | None) -> None:
        """
        Args:
            clock: of the device that samples; None where nothing is timed.
        """
        self.clock = clock if clock is not None and clock.measures_calls else None
        self.scores = Scores()
        self._lock = threading.Lock()
        self._errors: list[tuple[Cell, torch.Tensor]] = []
        self._times: list[tuple[Timed, Any, Any]] = []

    def mark(self) -> Any:
        """The clock's mark; None where nothing is timed."""
        return None if self.clock is None else self.clock.mark()

    def add_error(self, cell: Cell, sums: torch.Tensor) -> None:
        """Take what `error_sums` gave of a call."""
        with self._lock:
            self._errors.append((cell, sums))

    def add_time(self, timed: Timed, start: Any, end: Any) -> None:
        """Take the marks before and after a call; None for both is left out."""
        if start is not None and end is not None:
            with self._lock:
                self._times.append((timed, start, end))

    def settle(self) -> None:
        """Read all that calls have left. Waits for the device where they left anything."""
        with self._lock:
            errors, self._errors = self._errors, []
            times, self._times = self._times, []
        by_layout: dict[Any, list[tuple[Cell, torch.Tensor]]] = {}
        for cell, sums in errors:
            by_layout.setdefault((sums.shape, sums.device), []).append((cell, sums))
        for alike in by_layout.values():
            # One copy for all of them.
            values = torch.stack([sums for _, sums in alike]).tolist()
            for (cell, _), sums_of_heads in zip(alike, values):  # noqa: B905
                self.scores.add_error(cell, error_row(sums_of_heads))
        late = []
        for timed, start, end in times:
            if self.clock is None:
                continue
            if self.clock.reached(end):
                self.scores.add_time(timed, self.clock.elapsed_ms(start, end))
            else:
                late.append((timed, start, end))
        with self._lock:
            self._times = late + self._times
