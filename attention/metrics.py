"""Every metric of a layer at a step, defined once: name, meaning, direction, aggregation.

The recorder's columns, the wire, the database's columns, the figures and the page's choices all
follow from ``METRICS``. The module imports neither torch nor ComfyUI; how a number is computed
stands in ``quality.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from . import sums_paths


class Direction(str, Enum):
    """Which way is better."""

    LOWER = "lower"
    HIGHER = "higher"
    NEUTRAL = "neutral"


class Fold(str, Enum):
    """How the calls of one layer within one step become one number."""

    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    SUM = "sum"


@dataclass(frozen=True)
class Metric:
    """One metric of a layer at a step."""

    name: str
    title: str
    help: str
    unit: str = ""
    direction: Direction = Direction.NEUTRAL
    fold: Fold = Fold.MEAN
    log: bool = False
    """Whether a logarithmic axis is the natural one."""
    names: Mapping[int, str] = field(default_factory=dict, hash=False)
    """What each value stands for, where the metric is a code; empty for plain numbers."""

    def text(self, value: float) -> str:
        """A value for people, its unit left out."""
        if value.is_integer() and int(value) in self.names:
            return self.names[int(value)]
        return f"{value:.3g}"


METRICS: tuple[Metric, ...] = (
    Metric(
        "nmse",
        "NMSE",
        "Squared error of sampled outputs against exact attention on the unmodified query and "
        "key, over the squared norm of the exact outputs.",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "predicted_nmse",
        "NMSE, predicted",
        "What the router predicts the NMSE to stay below, of the candidate that it chose; empty "
        "where it chose exact attention.",
        direction=Direction.LOWER,
        fold=Fold.MAX,
        log=True,
    ),
    Metric(
        "budget_share",
        "Share of the layer's budget",
        "The predicted NMSE of what the router chose over the layer's error budget.",
        unit="share",
        direction=Direction.LOWER,
        fold=Fold.MAX,
    ),
    Metric(
        "cosine",
        "Cosine similarity",
        "Mean cosine between sampled outputs and exact ones, per query and head.",
        direction=Direction.HIGHER,
    ),
    Metric(
        "nmse_eff",
        "NMSE, effective",
        "Squared error of the same sampled outputs against exact attention on the query, key and "
        "scale that were expanded, after shaping. What NMSE is more than this, shaping costs.",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "cosine_eff",
        "Cosine similarity, effective",
        "Mean cosine of the same sampled outputs with exact attention after shaping.",
        direction=Direction.HIGHER,
    ),
    Metric(
        "log_mass_bias",
        "Log mass bias",
        "Mean over sampled queries of the log of the softmax denominator that the output stands "
        "for, less the logsumexp of the logits after shaping. Below 0 the approximation sees too "
        "little mass.",
    ),
    Metric(
        "denom_min",
        "Denominator, minimum",
        "Smallest softmax denominator, divided by the number of keys.",
        direction=Direction.HIGHER,
        fold=Fold.MIN,
    ),
    Metric(
        "denom_bad_frac",
        "Bad denominators",
        "Share of denominators at or below eps.",
        unit="share",
        direction=Direction.LOWER,
        fold=Fold.MAX,
    ),
    Metric(
        "probe_denom_min",
        "Probed denominator, minimum",
        "Smallest denominator among the queries of the early probe, divided by the number of "
        "keys.",
        direction=Direction.HIGHER,
        fold=Fold.MIN,
    ),
    Metric(
        "probe_bad_frac",
        "Bad probed denominators",
        "Share of the early probe's denominators at or below eps.",
        unit="share",
        direction=Direction.LOWER,
        fold=Fold.MAX,
    ),
    Metric(
        "qk_std",
        "q·k standard deviation",
        "Standard deviation of sampled scaled logits after each row's mean is taken off. Taylor "
        "of degree 2 needs about 1 or less.",
    ),
    Metric(
        "qk_p01",
        "q·k, 1st percentile",
        "1st percentile of sampled scaled logits, by nearest rank; NaN where one isn't finite.",
        fold=Fold.MIN,
    ),
    Metric(
        "qk_p50",
        "q·k, median",
        "Median of sampled scaled logits, by nearest rank; NaN where one isn't finite.",
    ),
    Metric(
        "qk_p99",
        "q·k, 99th percentile",
        "99th percentile of sampled scaled logits, by nearest rank; NaN where one isn't finite.",
        fold=Fold.MAX,
    ),
    Metric("q_norm", "Query norm", "Mean Euclidean norm of the sampled queries."),
    Metric("k_norm", "Key norm", "Mean Euclidean norm of the sampled keys."),
    Metric(
        "head_dim",
        "Head dimension",
        "Channels per head of the layer's calls.",
        unit="channels",
        fold=Fold.MAX,
    ),
    Metric(
        "feature_dim",
        "Feature dimension R",
        "Features of one series, also where the call fell back because they are too many.",
        unit="features",
        fold=Fold.MAX,
        log=True,
    ),
    Metric(
        "sums_path",
        "Sums computed by",
        "The implementation that computed the layer's sums, and why not a better one. Where calls "
        "differ, the least of them.",
        fold=Fold.MIN,
        names=sums_paths.NAMES,
    ),
    Metric(
        "attn_ms",
        "Attention time",
        "Time in attention calls, measurement of quality left out. On a GPU between two events.",
        unit="ms",
        direction=Direction.LOWER,
        fold=Fold.SUM,
    ),
)

METRIC_NAMES: tuple[str, ...] = tuple(metric.name for metric in METRICS)
BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}


def median(values: Iterable[float | None]) -> float | None:
    """Median of the values that were measured and are no NaN; None when there is none."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.median(known) if known else None


def worst(metric: Metric, values: Iterable[float | None]) -> tuple[int, float] | None:
    """Index and value of the worst layer; a NaN is worse than any number.

    Returns:
        None when nothing was measured or the metric has no better side.
    """
    if metric.direction is Direction.NEUTRAL:
        return None
    known = [(index, value) for index, value in enumerate(values) if value is not None]
    if not known:
        return None
    for index, value in known:
        if math.isnan(value):
            return index, value
    pick = max if metric.direction is Direction.LOWER else min
    return pick(known, key=lambda item: item[1])
