"""Buckets lose no spike, whatever window is looked at; bytes give back what was packed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.backend import downsampling
from attnscope.backend.distillation import BY_NAME
from attnscope.db import student_blocks

VALUES = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1.0, -1.0])
)
SERIES = st.lists(VALUES, min_size=1, max_size=300)


def series_of(values: list[float], begin: int) -> downsampling.Buckets:
    updates = np.arange(begin, begin + len(values), dtype=np.int64)
    return {0: (updates, np.array(values, np.float32))}  # type: ignore[return-value]


@settings(deadline=None, max_examples=200)
@given(
    values=SERIES,
    begin=st.integers(0, 5000),
    points=st.integers(2, 40),
    data=st.data(),
)
def test_every_extreme_of_any_window_is_in_the_answer(
    values: list[float], begin: int, points: int, data: st.DataObject
) -> None:
    low = data.draw(st.integers(begin, begin + len(values) - 1))
    high = data.draw(st.integers(low, begin + len(values) - 1))
    width = downsampling.width_for(low, high, points)
    first, last = low // width * width, (high // width + 1) * width - 1
    window = {
        layer: (u[(u >= first) & (u <= last)], v[(u >= first) & (u <= last)])
        for layer, (u, v) in series_of(values, begin).items()  # type: ignore[attr-defined]
    }
    made = downsampling.buckets(window, [0], low, high, width)
    assert made.low.shape == (1, len(made.start)) and len(made.start) <= points
    assert (made.start % width == 0).all()
    inside = np.array(values[low - begin : high - begin + 1], np.float32)
    finite = inside[np.isfinite(inside)]
    if len(finite):
        assert np.nanmin(made.low) <= finite.min() and np.nanmax(made.high) >= finite.max()
        for value in (finite.min(), finite.max()):
            place = (low + int(np.flatnonzero(inside == value)[0])) // width - low // width
            assert made.low[0, place] <= value <= made.high[0, place]
    # bucket by bucket, against the definition
    updates, numbers = window[0]
    assert made.counts.sum() == len(numbers)
    for place, start in enumerate(made.start):
        of_bucket = numbers[(updates >= start) & (updates < start + width)]
        good = of_bucket[np.isfinite(of_bucket)]
        assert made.nonfinite[0, place] == len(of_bucket) - len(good)
        found = [
            getattr(made, name)[0, place] for name in ("low", "high", "first", "last", "mean")
        ]
        if len(good) == 0:
            assert all(math.isnan(value) for value in found)
            continue
        mean = good.astype(np.float64).mean()
        assert found[:4] == [good.min(), good.max(), good[0], good[-1]]
        assert found[4] == pytest.approx(mean, rel=1e-6, abs=1e-30)


@given(first=st.integers(0, 10**9), length=st.integers(0, 10**7), points=st.integers(2, 4000))
def test_a_width_is_the_least_power_of_two_that_fits(first: int, length: int, points: int) -> None:
    last = first + length
    width = downsampling.width_for(first, last, points)
    assert width & (width - 1) == 0
    assert last // width - first // width + 1 <= points
    if width > 1:
        half = width // 2
        assert last // half - first // half + 1 > points


def test_a_student_that_was_set_back_goes_through_its_numbers_again() -> None:
    updates = np.array([1, 2, 3, 4, 2, 3, 9], np.int64)
    values = np.array([1, 2, 3, 4, 20, 30, 9], np.float32)
    made = downsampling.buckets({7: (updates, values)}, [7, 8], 0, 9, 4)
    assert made.low[0].tolist() == [1, 4, 9] and made.high[0].tolist() == [30, 4, 9]
    assert made.first[0].tolist() == [1, 4, 9] and made.last[0].tolist() == [30, 4, 9]
    assert np.isnan(made.low[1]).all() and made.nonfinite.sum() == 0


@settings(deadline=None)
@given(
    rows=st.lists(
        st.lists(st.one_of(st.none(), st.floats(0, 1e6, width=32)), min_size=8, max_size=8),
        min_size=1,
        max_size=9,
    )
)
def test_bands_are_the_quantiles_of_the_layers(rows: list[list[float | None]]) -> None:
    series = {}
    for layer, row in enumerate(rows):
        known = [(place, value) for place, value in enumerate(row) if value is not None]
        series[layer] = (
            np.array([place for place, _ in known], np.int64),
            np.array([value for _, value in known], np.float32),
        )
    made = downsampling.bands(downsampling.buckets(series, range(len(rows)), 0, 7, 1))
    for place in range(8):
        values = [row[place] for row in rows if row[place] is not None]
        assert made.layers[place] == len(values)
        if not values:
            assert math.isnan(made.low[place]) and math.isnan(made.quantiles[1][place])
            continue
        expected = np.quantile(np.array(values, np.float64), downsampling.QUANTILES)
        found = [quantile[place] for quantile in made.quantiles]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert made.low[place] == min(values) and made.high[place] == max(values)


@pytest.mark.parametrize(
    ("metric", "side"),
    [("nmse", "high"), ("cosine", "low"), ("ready", "low"), ("seconds", "high")],
)
def test_the_map_shows_the_side_that_wants_attention(metric: str, side: str) -> None:
    series = {0: (np.arange(4), np.array([0.5, 0.25, 1.0, 0.75], np.float32))}
    made = downsampling.buckets(series, [0], 0, 3, 4)
    shown = downsampling.worst(made, BY_NAME[metric])
    assert shown.tolist() == [[1.0 if side == "high" else 0.25]]


@given(values=st.lists(st.one_of(st.none(), VALUES), min_size=1, max_size=70))
def test_a_metric_comes_back_from_its_bytes(values: list[float | None]) -> None:
    column = student_blocks.of_metric(values)
    assert column.measured.tolist() == [value is not None for value in values]
    data = student_blocks.pack_metric(column)
    if data is None:
        assert not column.measured.any()
        return
    back = student_blocks.unpack_metric(data, len(values))
    assert back.measured.tolist() == column.measured.tolist()
    given_ = np.array([value for value in values if value is not None], np.float32)
    np.testing.assert_array_equal(back.values[back.measured], given_)


@given(
    missing=st.integers(0, 1024),
)
def test_the_bits_are_told_from_the_values_at_every_fill(missing: int) -> None:
    values: list[float | None] = [None] * missing + [1.0] * (1024 - missing)
    data = student_blocks.pack_metric(student_blocks.of_metric(values))
    if missing < 1024:
        assert data is not None
        back = student_blocks.unpack_metric(data, 1024)
        assert int(back.measured.sum()) == 1024 - missing


@given(numbers=st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=50))
def test_whole_numbers_come_back_from_their_bytes(numbers: list[int]) -> None:
    made = np.array(numbers, np.int64)
    assert student_blocks.unpack_whole(student_blocks.pack_whole(made)).tolist() == numbers
