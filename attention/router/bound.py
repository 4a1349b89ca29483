"""What the error of a run yet to come stays below, told from the errors of earlier ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95

LEAST, MOST = 1e-12, 1e6
"""Errors are taken to lie between these; NaN and infinity count as `MOST`."""

_T95 = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771,
    1.761, 1.753, 1.746, 1.740,
)  # fmt: skip
"""95 % quantiles of Student's t with 1, 2, … degrees of freedom."""

_ENOUGH = 19
"""From here on an order statistic has the confidence: n/(n+1) >= 0.95."""


def clamped(error: float) -> float:
    """An error within the range that is reckoned with."""
    return min(MOST, max(LEAST, error)) if math.isfinite(error) else MOST


def upper_bound(errors: Sequence[float]) -> float | None:
    """P(error of another run <= bound) >= 0.95, the runs being exchangeable.

    From 19 runs on the ⌈0.95·(n+1)⌉-th smallest, which holds for any distribution (split
    conformal prediction). Below, no order statistic does: then the prediction bound of a normal
    distribution of the errors' logarithms, mean + t·s·√(1 + 1/n), and at least the largest error.

    Args:
        errors: one for each run.

    Returns:
        None with fewer than two runs.
    """
    count = len(errors)
    if count < 2:
        return None
    ordered = sorted(clamped(error) for error in errors)
    if count >= _ENOUGH:
        return ordered[math.ceil(CONFIDENCE * (count + 1)) - 1]
    logs = [math.log(error) for error in ordered]
    reach = _T95[count - 2] * statistics.stdev(logs) * math.sqrt(1.0 + 1.0 / count)
    return max(ordered[-1], math.exp(min(math.log(MOST), statistics.fmean(logs) + reach)))
