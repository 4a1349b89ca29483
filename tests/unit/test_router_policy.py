"""The router's plan: within its budgets, all exact without one, near the best there is."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnscope.attention.reasons import Gate
from attnscope.attention.router.policy import (
    Budget,
    Decision,
    LayerOptions,
    Option,
    budget_of,
    plan,
    predicted_sum,
    within,
)
from attnscope.attention.settings import RouterSettings

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A test may be stopped for a while on a machine that is shared."""

ERRORS = st.floats(1e-6, 1.0)
COSTS = st.floats(0.1, 10.0)


@st.composite
def steps(draw: st.DrawFn, layers: int = 6, options: int = 3) -> list[LayerOptions]:
    made = []
    for index in range(draw(st.integers(0, layers))):
        found = []
        for name in "abc"[: draw(st.integers(0, options))]:
            predicted = draw(st.none() | ERRORS)
            group = draw(st.floats(1.0, 20.0)) * (predicted or 0.0)
            found.append(Option(name, predicted, group, draw(st.none() | COSTS)))
        exact = draw(st.none() | COSTS)
        made.append(LayerOptions(f"single.{index}", exact, tuple(found)))
    return made


BUDGETS = st.builds(
    Budget, st.floats(0.0, 1.0), st.floats(0.0, 3.0), st.sampled_from([0.0, 1.0, 4.0, 8.0])
)


def saved(decisions: dict[str, Decision]) -> float:
    return sum(decision.saving for decision in decisions.values())


@unhurried
@given(steps(), BUDGETS)
def test_no_budget_is_ever_exceeded_and_every_layer_is_told_why(
    layers: list[LayerOptions], budget: Budget
) -> None:
    decisions = plan(layers, budget)
    assert list(decisions) == [layer.layer for layer in layers]
    assert predicted_sum(decisions) <= budget.step * (1 + 1e-6)
    for layer in layers:
        decision = decisions[layer.layer]
        assert (decision.chosen is None) == (decision.reason is not None)
        if decision.chosen is not None:
            assert decision.chosen in layer.options
            assert decision.chosen.predicted is not None
            assert decision.chosen.predicted <= budget.layer * (1 + 1e-6)
            if budget.group_limit:
                assert decision.chosen.group <= budget.group_limit * budget.layer * (1 + 1e-6)
            assert layer.exact_cost is not None and decision.chosen.cost is not None
            assert decision.chosen.cost < layer.exact_cost


@unhurried
@given(steps())
def test_quality_speed_0_is_all_exact_whatever_else_is_set(layers: list[LayerOptions]) -> None:
    asked = RouterSettings(quality_speed=0.0, budget_layer=1.0, budget_step=10.0)
    decisions = plan(layers, budget_of(asked, len(layers)))
    assert all(decision.chosen is None for decision in decisions.values())


@unhurried
@given(steps(), BUDGETS, st.floats(0.0, 3.0))
def test_a_larger_budget_of_the_step_never_saves_less(
    layers: list[LayerOptions], budget: Budget, more: float
) -> None:
    larger = Budget(budget.layer, budget.step + more, budget.group_limit)
    assert saved(plan(layers, larger)) >= saved(plan(layers, budget)) - 1e-9


@unhurried
@given(steps(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_larger_budget_of_layers_never_saves_less_where_the_step_sets_no_limit(
    layers: list[LayerOptions], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    less, more = (plan(layers, Budget(layer, math.inf)) for layer in (low, high))
    assert saved(more) >= saved(less) - 1e-9


@unhurried
@given(steps(layers=5), BUDGETS)
def test_it_is_within_one_step_of_the_best_plan_there_is(
    layers: list[LayerOptions], budget: Budget
) -> None:
    choices = []
    for layer in layers:
        mine = [(0.0, 0.0)]
        for option in layer.options:
            if within(option, budget) and None not in (option.cost, layer.exact_cost):
                mine.append((option.predicted, layer.exact_cost - option.cost))
        choices.append(mine)
    best = max(
        sum(saving for _, saving in picked)
        for picked in itertools.product(*choices)
        if sum(error for error, _ in picked) <= budget.step * (1 + 1e-9)
    )
    largest = max((saving for mine in choices for _, saving in mine), default=0.0)
    assert best - max(0.0, largest) - 1e-9 <= saved(plan(layers, budget)) <= best + 1e-6


@unhurried
@given(steps(), BUDGETS)
def test_the_same_arguments_give_the_same_plan(layers: list[LayerOptions], budget: Budget) -> None:
    assert plan(layers, budget) == plan(list(layers), budget)


def one(*options: Option, exact: float | None = 10.0, budget: Budget) -> Decision:
    return plan([LayerOptions("single.0", exact, options)], budget)["single.0"]


def test_every_reason() -> None:
    budget = Budget(0.1, 0.05, 2.0)
    assert one(Option("a", None), budget=budget).reason is Gate.ROUTER_UNMEASURED
    assert one(budget=budget).reason is Gate.ROUTER_UNMEASURED
    over = Option("a", 0.2, 0.2, 1.0)
    assert one(over, budget=budget).reason is Gate.ROUTER_OVER_BUDGET
    some_heads = Option("a", 0.01, 0.3, 1.0)
    assert one(some_heads, budget=budget).reason is Gate.ROUTER_OVER_BUDGET
    slow = Option("a", 0.01, 0.01, 11.0)
    assert one(slow, budget=budget).reason is Gate.ROUTER_NOT_FASTER
    untimed = Option("a", 0.01, 0.01, None)
    assert one(untimed, budget=budget).reason is Gate.ROUTER_NOT_FASTER
    dear = Option("a", 0.06, 0.06, 1.0)
    assert one(dear, budget=budget).reason is Gate.ROUTER_STEP_BUDGET
    good = Option("a", 0.04, 0.04, 1.0)
    assert one(good, budget=budget) == Decision("single.0", good, 9.0, None)


def test_the_cheapest_that_fits_wins_and_the_step_decides_between_layers() -> None:
    fast, close = Option("fast", 0.05, 0.05, 1.0), Option("close", 0.01, 0.01, 4.0)
    layers = [LayerOptions(f"single.{index}", 10.0, (fast, close)) for index in range(3)]
    everything = plan(layers, Budget(0.1, 1.0))
    assert [d.chosen for d in everything.values()] == [fast, fast, fast]
    tight = plan(layers, Budget(0.1, 0.075))
    # Each layer's close one first, since it saves most for its error; what is left makes the first
    # layer fast.
    assert [d.chosen for d in tight.values()] == [fast, close, close]
    assert [d.chosen for d in plan(layers, Budget(0.02, 1.0)).values()] == [close] * 3


@pytest.mark.parametrize(
    ("given", "layer", "step"),
    [
        ({"quality_speed": 0.5}, 0.0125, 0.0625),
        ({"quality_speed": 1.0}, 0.1, 0.5),
        ({"quality_speed": 0.0}, 0.0, 0.0),
        ({"budget_layer": 0.02}, 0.02, 0.1),
        ({"budget_layer": 0.02, "budget_step": 0.03}, 0.02, 0.03),
        ({"budget_step": 0.03}, 0.0125, 0.03),
    ],
)
def test_budgets_of_settings(given: dict[str, float], layer: float, step: float) -> None:
    budget = budget_of(RouterSettings(**given), 10)
    assert (budget.layer, budget.step) == (pytest.approx(layer), pytest.approx(step))
