"""Figures over the layers of a step, and over the steps of a run. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..attention.metrics import BY_NAME, median, worst
from ..wire import LayerColumns

Values = Sequence[float | None]


@dataclass(frozen=True)
class StepFigures:
    """One step over its layers; names as in ``schemas.Step``."""

    nmse_median: float | None
    nmse_worst: float | None
    worst_layer: str | None
    cosine_median: float | None
    cosine_worst: float | None
    calls: int
    calls_gated: int
    calls_fallback: int
    fallback_share: float | None
    gated_share: float | None
    attn_ms: float | None
    qk_std_median: float | None
    qk_p01_min: float | None
    qk_p99_max: float | None
    denom_min: float | None
    nonfinite: int


def of_step(layers: LayerColumns) -> StepFigures:
    """Sum up what the layers did in one step."""
    metrics = layers.metrics
    nmse = metrics.get("nmse", ())
    cosine = metrics.get("cosine", ())
    nmse_worst = worst(BY_NAME["nmse"], nmse)
    cosine_worst = worst(BY_NAME["cosine"], cosine)
    calls = sum(layers.calls)
    gated = sum(layers.calls_gated)
    fallback = sum(layers.calls_fallback)
    return StepFigures(
        nmse_median=median(nmse),
        nmse_worst=nmse_worst[1] if nmse_worst else None,
        worst_layer=layers.layer[nmse_worst[0]] if nmse_worst else None,
        cosine_median=median(cosine),
        cosine_worst=cosine_worst[1] if cosine_worst else None,
        calls=calls,
        calls_gated=gated,
        calls_fallback=fallback,
        fallback_share=share(fallback, calls),
        gated_share=share(gated, calls),
        attn_ms=total(metrics.get("attn_ms", ())),
        qk_std_median=median(metrics.get("qk_std", ())),
        qk_p01_min=least(metrics.get("qk_p01", ())),
        qk_p99_max=greatest(metrics.get("qk_p99", ())),
        denom_min=least(metrics.get("denom_min", ())),
        nonfinite=sum(nonfinite(column) for column in metrics.values()),
    )


def share(part: int, whole: int) -> float | None:
    """A part of a whole; None when there is no whole."""
    return part / whole if whole else None


def total(values: Values) -> float | None:
    """Sum of what was measured; None when nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def least(values: Values) -> float | None:
    """Smallest value; NaN when one is NaN, None when nothing was measured."""
    known = [value for value in values if value is not None]
    if any(math.isnan(value) for value in known):
        return math.nan
    return min(known, default=None)


def greatest(values: Values) -> float | None:
    """Largest value; NaN when one is NaN, None when nothing was measured."""
    known = [value for value in values if value is not None]
    if any(math.isnan(value) for value in known):
        return math.nan
    return max(known, default=None)


def nonfinite(values: Values) -> int:
    """How many values are NaN or infinite."""
    return sum(1 for value in values if value is not None and not math.isfinite(value))


def is_worse_nmse(candidate: float | None, current: float | None) -> bool:
    """Whether a step's worst NMSE is worse than the run's so far; NaN is worse than any."""
    if candidate is None or (current is not None and math.isnan(current)):
        return False
    return current is None or math.isnan(candidate) or candidate > current
