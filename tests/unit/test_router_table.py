"""The router's table: bounds that hold, runs that add up, files that are checked."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnscope.attention.router import bins
from attnscope.attention.router.bound import LEAST, MOST, upper_bound
from attnscope.attention.router.calibration import error_row
from attnscope.attention.router.table import (
    EXACT,
    KEPT_ERRORS,
    KEPT_TIMES,
    Cell,
    Prediction,
    Scores,
    Table,
    TableError,
    Timed,
    from_json,
    to_json,
)

CELL = Cell("tiled-0123", "single.3", 5, 20)
TIMED = Timed("tiled-0123", "single.3", 20, "cpu")
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A test may be stopped for a while on a machine that is shared."""

ERRORS = st.floats(1e-9, 1e3)


def scored(*rows: list[float], ms: float | None = None) -> Scores:
    scores = Scores(candidates={"tiled-0123": "tiled"})
    for row in rows:
        scores.add_error(CELL, row)
    if ms is not None:
        scores.add_time(TIMED, ms)
    return scores


@pytest.mark.parametrize("runs", [2, 4, 8, 18, 19, 39, 40])
def test_the_bound_holds_for_a_new_run_in_95_of_100(runs: int) -> None:
    draw = random.Random(runs)
    held = 0
    for _ in range(4000):
        errors = [math.exp(draw.gauss(-5.0, 0.7)) for _ in range(runs + 1)]
        bound = upper_bound(errors[:-1])
        assert bound is not None
        held += errors[-1] <= bound
    # Four standard errors of the share.
    assert held / 4000 >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 4000)


@unhurried
@given(st.lists(ERRORS, min_size=2, max_size=18))
def test_the_bound_is_never_below_what_was_seen(errors: list[float]) -> None:
    bound = upper_bound(errors)
    assert bound is not None and bound >= max(errors)
    assert upper_bound(list(reversed(errors))) == bound


def test_the_bound_of_many_runs_is_the_order_statistic() -> None:
    assert upper_bound([float(n) for n in range(1, 20)]) == 19.0
    # ⌈0.95 · 40⌉ = 38 of 39.
    assert upper_bound([float(n) for n in range(1, 40)]) == 38.0


def test_too_few_runs_give_no_bound_and_what_is_no_number_the_worst() -> None:
    assert upper_bound([]) is None
    assert upper_bound([0.1]) is None
    assert upper_bound([0.1, math.nan]) == MOST
    assert upper_bound([0.1, math.inf]) == MOST
    assert upper_bound([0.0, 0.0]) == pytest.approx(LEAST)


def test_a_run_counts_once_with_its_largest_errors() -> None:
    table = Table().with_run(scored([0.1, 0.2, 0.05], [0.15, 0.1, 0.2]))
    assert table.errors[CELL] == ((0.15, 0.2, 0.2),)
    assert table.measured(CELL) == 1
    assert table.predicted(CELL) is None
    table = table.with_run(scored([0.15, 0.2, 0.2]))
    assert table.predicted(CELL) == Prediction(pytest.approx(0.15), pytest.approx(0.2))
    assert table.runs == 2


def test_the_newest_runs_are_kept() -> None:
    table = Table()
    for run in range(KEPT_ERRORS + 5):
        table = table.with_run(scored([run + 1.0, 1.0], ms=float(run)))
    assert [row[0] for row in table.errors[CELL]] == [n + 6.0 for n in range(KEPT_ERRORS)]
    assert len(table.times[TIMED]) == KEPT_TIMES
    assert table.ms(TIMED) == KEPT_ERRORS + 4 - KEPT_TIMES // 2
    assert table.ms(TIMED._replace(what=EXACT)) is None


def test_a_run_that_measured_nothing_leaves_no_trace() -> None:
    table = Table()
    assert table.with_run(Scores(candidates={"a": "b"})) is table


def test_another_number_of_heads_begins_anew() -> None:
    table = Table().with_run(scored([0.1, 0.1])).with_run(scored([0.1, 0.1, 0.1]))
    assert table.measured(CELL) == 1


RUNS = st.lists(st.lists(ERRORS, min_size=3, max_size=3), max_size=10)


def table_of(runs: list[list[float]]) -> Table:
    table = Table()
    for run in runs:
        table = table.with_run(scored(run, ms=run[0]))
    return table


@unhurried
@given(RUNS, RUNS)
def test_merged_tables_are_what_all_runs_would_have_made(
    first: list[list[float]], second: list[list[float]]
) -> None:
    assert table_of(first).merged(table_of(second)) == table_of([*first, *second])


@unhurried
@given(RUNS)
def test_a_file_brings_back_what_was_written(runs: list[list[float]]) -> None:
    table = table_of([[float(f"{x:.4g}") for x in run] for run in runs])
    assert from_json(to_json(table, "flux"), "flux") == table


def test_files_that_are_refused_say_why() -> None:
    good = json.loads(to_json(table_of([[0.1, 0.2, 0.3]]), "flux"))

    def refused(**changed: object) -> str:
        with pytest.raises(TableError) as caught:
            from_json(json.dumps({**good, **changed}), "flux")
        return str(caught.value)

    assert refused(model="other") == "model: is 'other'; allowed: 'flux', which is sampled"
    assert refused(version=2).startswith("version: is 2;")
    assert refused(format="x").startswith("format: is 'x';")
    assert refused(more=1).startswith("more: is 1;")
    errors = good["errors"][0]
    assert refused(errors=[{**errors, "runs": [[0.1], [0.1, 0.2]]}]).startswith("errors.0.runs:")
    assert "holds -1.0" in refused(errors=[{**errors, "runs": [[-1.0]]}])
    assert refused(errors=[{**errors, "runs": [["x"]]}]).startswith("errors.0.runs.0.0: is 'x'")
    assert refused(times=[{**good["times"][0], "runs_ms": []}]).startswith("times.0.runs_ms:")
    with pytest.raises(TableError, match="JSON"):
        from_json("{")


def test_heads_are_added_up_to_the_layer_by_energy() -> None:
    errors, energies = [1.0, 3.0, 0.0, 2.0], [10.0, 10.0, 100.0, 1.0]
    assert error_row([errors, energies]) == pytest.approx([6 / 121, 0.1, 0.3, 0.0, 2.0])
    assert error_row([[0.0], [0.0]]) == [0.0, 0.0]
    assert error_row([[1.0], [0.0]]) == [math.inf, math.inf]


@unhurried
@given(st.integers(1, 64))
def test_every_head_is_in_one_group(heads: int) -> None:
    groups = bins.head_groups(heads)
    assert [head for group in groups for head in group] == list(range(heads))
    assert len(groups) == min(heads, bins.HEAD_GROUPS)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@unhurried
@given(st.floats(0.0, 200.0), st.floats(0.0, 200.0))
def test_sigma_bins_keep_the_order(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert bins.sigma_bin(low) <= bins.sigma_bin(high)


def test_bins_by_example() -> None:
    assert [bins.sigma_bin(s) for s in (0.0, 0.1, 0.125, 0.99, 1.0, 1.01, 1.5, 14.6)] == [
        0, 0, 1, 7, 7, 8, 9, 15,
    ]  # fmt: skip
    assert bins.token_class(1024) == 20
    assert bins.token_class(1088) == 20
    assert bins.token_class(4608) == 24
