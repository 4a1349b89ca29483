"""How a variant's settings follow sigma over a run, drawn from the functions that the sampler
itself asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from ...attention.hybrid import schedules as hybrid
from ...attention.settings import HybridSettings, VariantSettings
from .common import BLUE, ORANGE, Figure, layout, line, step_axis, value_axis

OfSigma = Callable[[VariantSettings, float, int], float]
"""Of settings, sigma and tokens in the sequence."""


@dataclass(frozen=True)
class Schedule:
    """Something that follows sigma."""

    name: str
    title: str
    unit: str
    color: str
    value: OfSigma


def _window(settings: VariantSettings, sigma: float, tokens: int) -> float:
    return hybrid.local_window(cast(HybridSettings, settings), sigma, tokens)


def _weight(settings: VariantSettings, sigma: float, tokens: int) -> float:
    return hybrid.global_weight(cast(HybridSettings, settings), sigma)


SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    "hybrid": (
        Schedule("local_window", "Local window", "tokens", BLUE, _window),
        Schedule("global_weight", "Global weight", "", ORANGE, _weight),
    )
}
"""By the variant's name; a variant without any is left out."""


def build(
    schedule: Schedule, settings: VariantSettings, sigmas: Sequence[float], tokens: int
) -> Figure:
    """A schedule over the steps, with its numbers.

    Args:
        schedule: what to draw.
        settings: of the schedule's variant.
        sigmas: the run's, one more than steps.
        tokens: in the sequence; what a window over everything stands for.
    """
    steps = sigmas[:-1]
    trace = line(schedule.title, "", "", schedule.color)
    del trace["meta"]
    trace |= {
        "x": list(range(len(steps))),
        "y": [schedule.value(settings, sigma, tokens) for sigma in steps],
        "customdata": list(steps),
        "hovertemplate": f"{schedule.title} %{{y:.4~r}} at σ %{{customdata:.4f}}<extra></extra>",
    }
    axis = value_axis(schedule.title, unit=schedule.unit) | {"rangemode": "tozero"}
    return {"data": [trace], "layout": layout(xaxis=step_axis(), yaxis=axis)}
