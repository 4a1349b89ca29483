"""Readiness: an average free of bias, a threshold with hysteresis, a least number of updates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnscope.attention.ttr.readiness import MovingAverage, Rule, is_ready

RULE = Rule(threshold=0.1, hysteresis=1.5, min_updates=10)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(0.0, 0.99))
def test_the_average_is_that_of_weights_that_decay(values: list[float], decay: float) -> None:
    average = MovingAverage()
    for value in values:
        average.add(value, decay)
    weights = [decay ** (len(values) - 1 - place) for place in range(len(values))]
    wanted = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert average.value == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_a_value_that_is_not_finite_starts_the_average_anew() -> None:
    average = MovingAverage()
    assert average.value is None
    average.add(1.0, 0.9)
    average.add(math.nan, 0.9)
    assert average.value is None
    average.add(0.25, 0.9)
    assert average.value == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("was", "nmse", "updates", "ready"),
    [
        (False, 0.1, 10, True),
        (False, 0.1, 9, False),
        (False, 0.11, 10, False),
        (True, 0.15, 10, True),
        (True, 0.151, 10, False),
        (True, 0.01, 9, False),
        (True, None, 100, False),
        (True, math.nan, 100, False),
        (False, math.inf, 100, False),
    ],
)
def test_the_rule(was: bool, nmse: float | None, updates: int, ready: bool) -> None:
    assert is_ready(was, nmse, updates, RULE) is ready


def test_an_average_about_the_threshold_does_not_flicker() -> None:
    state, changes = False, 0
    for turn in range(40):
        now = is_ready(state, 0.1 + (0.02 if turn % 2 else -0.001), 50, RULE)
        changes += now != state
        state = now
    assert changes == 1
