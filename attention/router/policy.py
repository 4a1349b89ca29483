"""Which layers of a step run which candidate: a pure function of predictions, costs and budgets.

Each layer may take exact attention (no error, no saving) or one of its candidates; the predicted
errors of a layer and of the whole step have budgets; what is saved is to be as much as possible:
a knapsack with one choice per layer. The options of a layer that no mixture of others beats, from
exact attention upwards, make steps of falling saving per error. They are taken in that order over
all layers until one no longer fits. That is within one such step of the best there is, since it
solves the linear relaxation but for its last, broken step (Kellerer, Pferschy and Pisinger,
"Knapsack Problems", 2004, ch. 11). Stopping there rather than looking for something smaller that
would fit keeps the saving from falling when the step's budget is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..reasons import Gate
from ..settings.router import RouterSettings

SLACK = 1.0 + 1e-9
"""Sums of predictions may pass a budget by rounding alone."""


@dataclass(frozen=True, slots=True)
class Budget:
    """NMSE that may be predicted.

    Attributes:
        layer: of a layer.
        step: of all layers of a step together.
        group_limit: of a group of heads, as a multiple of ``layer``; 0 sets no limit.
    """

    layer: float
    step: float
    group_limit: float = 0.0


def budget_of(settings: RouterSettings, layers: int) -> Budget:
    """The budgets that settings ask for.

    ``quality_speed`` makes 0.1·q³ of a layer, and of a step half of that for each of its layers.
    A budget that is set itself holds instead; with ``quality_speed`` 0 nothing is allowed.
    """
    if settings.quality_speed <= 0.0:
        return Budget(0.0, 0.0)
    layer = settings.budget_layer or 0.1 * settings.quality_speed**3
    step = settings.budget_step or 0.5 * layer * layers
    return Budget(layer, step, settings.head_group_limit)


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate at a layer.

    Attributes:
        name: of the candidate.
        predicted: NMSE of the layer; None where too little was measured.
        group: the largest predicted NMSE of a group of heads.
        cost: of the call; None where it isn't known.
    """

    name: str
    predicted: float | None
    group: float = 0.0
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """What a layer may choose from.

    Attributes:
        layer: its name.
        exact_cost: of exact attention, in the options' unit; None where it isn't known.
        options: the candidates.
    """

    layer: str
    exact_cost: float | None
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a layer runs.

    Attributes:
        layer: its name.
        chosen: the candidate; None for exact attention.
        saving: of the choice, in the costs' unit.
        reason: why exact attention; None where a candidate was chosen.
    """

    layer: str
    chosen: Option | None
    saving: float = 0.0
    reason: Gate | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """From one option of a layer to the next one."""

    place: int
    option: Option
    error: float
    saving: float


def plan(layers: Sequence[LayerOptions], budget: Budget) -> dict[str, Decision]:
    """Choose for every layer of a step. The same arguments give the same choices.

    Args:
        layers: each once, in the model's order.
        budget: of a layer, and of all of them.
    """
    steps: list[_Step] = []
    reasons: list[Gate] = []
    for place, layer in enumerate(layers):
        reason, useful = _useful(layer, budget)
        reasons.append(reason)
        steps += _hull(place, useful)
    # Ties go by the model's order, then by name.
    steps.sort(key=lambda s: (-s.saving / max(s.error, 1e-300), s.place, s.option.name))
    taken: dict[int, Option] = {}
    spent = 0.0
    for step in steps:
        if spent + step.error > budget.step * SLACK:
            break
        spent += step.error
        taken[step.place] = step.option
    decisions: dict[str, Decision] = {}
    for place, layer in enumerate(layers):
        option = taken.get(place)
        if option is None:
            decisions[layer.layer] = Decision(layer.layer, None, reason=reasons[place])
        else:
            decisions[layer.layer] = Decision(layer.layer, option, _saving(layer, option))
    return decisions


def within(option: Option, budget: Budget) -> bool:
    """Whether a candidate's predicted errors are within a layer's budget."""
    if option.predicted is None or option.predicted > budget.layer * SLACK:
        return False
    return budget.group_limit <= 0.0 or option.group <= budget.group_limit * budget.layer * SLACK


def predicted_sum(decisions: Mapping[str, Decision]) -> float:
    """Sum of the predicted errors of what was chosen."""
    return sum(
        decision.chosen.predicted or 0.0
        for decision in decisions.values()
        if decision.chosen is not None
    )


def _saving(layer: LayerOptions, option: Option) -> float:
    if layer.exact_cost is None or option.cost is None:
        return 0.0
    return layer.exact_cost - option.cost


def _useful(layer: LayerOptions, budget: Budget) -> tuple[Gate, list[tuple[Option, float]]]:
    """The options that may be chosen with their savings, and why none is where none comes off."""
    measured = [option for option in layer.options if option.predicted is not None]
    if not measured:
        return Gate.ROUTER_UNMEASURED, []
    allowed = [option for option in measured if within(option, budget)]
    if not allowed:
        return Gate.ROUTER_OVER_BUDGET, []
    useful = [(option, _saving(layer, option)) for option in allowed]
    useful = [(option, saving) for option, saving in useful if saving > 0.0]
    if not useful:
        return Gate.ROUTER_NOT_FASTER, []
    return Gate.ROUTER_STEP_BUDGET, useful


def _hull(place: int, useful: Sequence[tuple[Option, float]]) -> list[_Step]:
    """Steps from exact attention along the upper convex hull of saving over error."""
    points = sorted(useful, key=lambda item: (item[0].predicted or 0.0, -item[1], item[0].name))
    hull: list[tuple[Option | None, float, float]] = [(None, 0.0, 0.0)]
    for option, saving in points:
        error = option.predicted or 0.0
        if saving <= hull[-1][2]:
            continue
        while len(hull) > 1 and _steeper(hull[-2], hull[-1], error, saving):
            hull.pop()
        hull.append((option, error, saving))
    return [
        _Step(place, option, error - before[1], saving - before[2])
        for before, (option, error, saving) in pairwise(hull)
        if option is not None
    ]


def _steeper(
    first: tuple[Option | None, float, float],
    middle: tuple[Option | None, float, float],
    error: float,
    saving: float,
) -> bool:
    """Whether going from ``first`` straight on saves at least as much as by way of ``middle``."""
    direct = (saving - first[2]) * (middle[1] - first[1])
    return direct >= (middle[2] - first[2]) * (error - first[1])
