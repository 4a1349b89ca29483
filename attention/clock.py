"""How the time of a device is told, by whoever has a clock for it."""

from __future__ import annotations

from typing import Any, Protocol


class Clock(Protocol):
    """Takes marks and tells the time between two of them."""

    measures_calls: bool
    """Whether a mark stands for the work before it, rather than for its submission."""

    def mark(self) -> Any:
        """A point in the order of the device's work."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds from one mark to a later one. The later one must have been reached."""

    def reached(self, mark: Any) -> bool:
        """Whether the device has come to the mark. Never waits."""
