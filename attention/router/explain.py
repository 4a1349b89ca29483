"""Why a layer runs what it runs, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..reasons import Gate
from .policy import Budget, Decision, LayerOptions, Option, within


def explain(
    layer: LayerOptions,
    decision: Decision,
    budget: Budget,
    unit: str,
    *,
    runs: Mapping[str, int],
    min_runs: int,
    kept_out: Sequence[tuple[str, Gate]] = (),
) -> str:
    """All that a decision was made of, such as ``exact 4.2 ms; tiled up to 0.003 in 1.9 ms``.

    Args:
        layer: what there was to choose from.
        decision: what was chosen.
        budget: that held.
        unit: of the costs.
        runs: candidate's name to the runs that have measured it here.
        min_runs: that have to.
        kept_out: candidates that their own gates keep out, with the gate.
    """
    parts = [f"budget {budget.layer:.3g} a layer, {budget.step:.3g} a step"]
    if layer.exact_cost is not None:
        parts.append(f"exact {layer.exact_cost:.3g} {unit}")
    for option in layer.options:
        parts.append(_of_option(option, decision, budget, unit, runs, min_runs))
    parts += [f"{name}: {gate.value}" for name, gate in kept_out]
    return "; ".join(parts)


def _of_option(
    option: Option,
    decision: Decision,
    budget: Budget,
    unit: str,
    runs: Mapping[str, int],
    min_runs: int,
) -> str:
    if option.predicted is None:
        return f"{option.name} measured in {runs.get(option.name, 0)} of {min_runs} runs"
    text = f"{option.name} up to {option.predicted:.3g}"
    if option.predicted <= budget.layer and not within(option, budget):
        text += f" but {option.group:.3g} in some heads"
    if option.cost is not None:
        text += f" in {option.cost:.3g} {unit}"
    if decision.chosen is not None and decision.chosen.name == option.name:
        text += " (chosen)"
    return text
