"""When a layer's student may serve: moving averages, a threshold and its hysteresis. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class MovingAverage:
    """Exponential moving average, free of the bias to its first value.

    With weights decay^age, as Adam corrects its moments (Kingma and Ba, arXiv:1412.6980, 3): the
    first of few values, which is the worst of a training, would else outweigh the others.

    Attributes:
        total: Σ decay^age · value · (1 - decay).
        weight: Σ decay^age · (1 - decay).
    """

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float | None:
        """None before the first value."""
        return self.total / self.weight if self.weight > 0.0 else None

    def add(self, value: float, decay: float) -> None:
        """Take a value. One that is not finite starts the average anew: it would stay for ever.

        Args:
            value: the newest.
            decay: in [0, 1), what the older ones keep of their weight.
        """
        if not math.isfinite(value):
            self.total = self.weight = 0.0
            return
        self.total = decay * self.total + (1.0 - decay) * value
        self.weight = decay * self.weight + (1.0 - decay)


@dataclass(frozen=True, slots=True)
class Rule:
    """What makes a layer ready.

    Attributes:
        threshold: most that the average of the held-out NMSE may be.
        hysteresis: a ready layer stays so up to the threshold times this, at least 1.
        min_updates: before which no layer is ready.
    """

    threshold: float
    hysteresis: float
    min_updates: int


def is_ready(was_ready: bool, nmse: float | None, updates: int, rule: Rule) -> bool:
    """Whether a layer's student may serve.

    Args:
        was_ready: up to now.
        nmse: average on held-out queries; None where it was never measured.
        updates: that the layer has had.
        rule: see `Rule`.
    """
    if nmse is None or not math.isfinite(nmse) or updates < rule.min_updates:
        return False
    limit = rule.threshold * (rule.hysteresis if was_ready else 1.0)
    return nmse <= limit
