"""Long series as buckets: numbers over arrays, no database, no figure.

A bucket holds the smallest, the largest, the first and the last finite value of a stretch of
update numbers (U. Jugel, Z. Jerzak, G. Hackenbroich and V. Markl, "M4: a visualization-oriented
time series data aggregation", VLDB 7 (2014), section 4), so a spike of one update shows at every
width.
Buckets are as wide as a power of two and begin at multiples of it: wider ones are made of whole
narrower ones, and a growing series changes its last bucket alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..attention.metrics import Direction, Fold, Metric

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

QUANTILES = (0.1, 0.5, 0.9)
ENOUGH = 500
"""Measured values of a layer that tell how far apart they usually are."""


def width_for(first: int, last: int, points: int) -> int:
    """The least power of two that covers update numbers with so many buckets at most.

    Args:
        first: least update number.
        last: greatest one.
        points: most buckets, at least 2.
    """
    width = 1
    while last // width - first // width + 1 > points:
        width *= 2
    return width


def width_of_stride(series: Iterable[npt.NDArray[np.int64]]) -> int:
    """The least power of two that is no narrower than the usual gap between measured updates.

    Narrower buckets would mostly be empty and draw a metric that comes at every tenth update as
    stripes.
    """
    newest = [updates[-ENOUGH:] for updates in series]
    gaps = [float(np.median(np.diff(updates))) for updates in newest if len(updates) > 1]
    usual = float(np.median(gaps)) if gaps else 1.0
    width = 1
    while width < usual:
        width *= 2
    return width


@dataclass(frozen=True)
class Buckets:
    """Series of several layers in the same buckets, float64 [layers, buckets] each.

    Attributes:
        start: first update number of each bucket, int64 [buckets].
        width: update numbers of a bucket.
        low: smallest finite value; NaN where there is none, as in the other four.
        high: largest.
        first: of the finite values the first one.
        last: and the last one.
        mean: and their mean.
        nonfinite: how many were NaN or infinite, int64.
        counts: measured values of all layers, int64 [buckets].
    """

    start: Ints
    width: int
    low: Floats
    high: Floats
    first: Floats
    last: Floats
    mean: Floats
    nonfinite: Ints
    counts: Ints


def buckets(
    series: Mapping[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]],
    layers: Sequence[int],
    first: int,
    last: int,
    width: int,
) -> Buckets:
    """Put series into buckets.

    Args:
        series: by layer, update numbers and values; NaN and infinities are counted.
        layers: the rows of the answer, in order.
        first: least update number; the first bucket is the one that holds it.
        last: greatest one.
        width: of a bucket, a power of two.
    """
    shift = width.bit_length() - 1
    begin = first // width
    count = last // width - begin + 1
    shape = (len(layers), count)
    made = {name: np.full(shape, np.nan) for name in ("low", "high", "first", "last", "mean")}
    nonfinite = np.zeros(shape, np.int64)
    counts = np.zeros(count, np.int64)
    for row, layer in enumerate(layers):
        if layer not in series:
            continue
        updates, values = series[layer]
        place = (updates >> shift) - begin
        finite = np.isfinite(values)
        if not finite.all():
            nonfinite[row] = np.bincount(place[~finite], minlength=count)
            counts += nonfinite[row]
            place, values = place[finite], values[finite]
        if len(values) == 0:
            continue
        jumps = np.diff(place)
        if len(jumps) and jumps.min() < 0:
            # a student that was set back goes through the same numbers again
            order = np.argsort(place, kind="stable")
            place, values = place[order], values[order]
            jumps = np.diff(place)
        starts = np.append(0, np.flatnonzero(jumps) + 1)
        at = place[starts]
        ends = np.append(starts[1:], len(values))
        counts[at] += ends - starts
        made["low"][row, at] = np.minimum.reduceat(values, starts)
        made["high"][row, at] = np.maximum.reduceat(values, starts)
        made["first"][row, at] = values[starts]
        made["last"][row, at] = values[ends - 1]
        made["mean"][row, at] = np.add.reduceat(values, starts, dtype=np.float64) / (ends - starts)
    start = (begin + np.arange(count, dtype=np.int64)) * width
    return Buckets(start=start, width=width, nonfinite=nonfinite, counts=counts, **made)


def worst(made: Buckets, metric: Metric) -> Floats:
    """Of each bucket the value that wants attention, [layers, buckets].

    The largest where less is better, the smallest where more is; of a metric without a better side
    what its fold says, else the largest.
    """
    if metric.direction is Direction.HIGHER or metric.fold is Fold.MIN:
        return made.low
    return made.high


@dataclass(frozen=True)
class Bands:
    """A metric over the layers, float64 [buckets] each; NaN where no layer has a value.

    Attributes:
        quantiles: of the layers' means in a bucket, one array for each of `QUANTILES`, by linear
            interpolation.
        low: smallest value of any layer.
        high: largest.
        layers: how many layers have a value, int64.
    """

    quantiles: tuple[Floats, ...]
    low: Floats
    high: Floats
    layers: Ints


def bands(made: Buckets) -> Bands:
    """How a metric spreads over the layers."""
    count = made.mean.shape[1]
    ordered = np.sort(made.mean, axis=0)  # NaN come last
    known = np.isfinite(made.mean).sum(axis=0)
    column = np.arange(count)
    found = []
    for share in QUANTILES:
        place = share * np.maximum(known - 1, 0)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, np.maximum(known - 1, 0))
        if len(ordered) == 0:
            found.append(np.full(count, np.nan))
            continue
        part = place - below
        found.append(ordered[below, column] * (1 - part) + ordered[above, column] * part)
    return Bands(
        quantiles=tuple(found),
        low=np.fmin.reduce(made.low, axis=0, initial=np.nan),
        high=np.fmax.reduce(made.high, axis=0, initial=np.nan),
        layers=known,
    )
