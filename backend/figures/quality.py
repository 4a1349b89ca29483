"""A metric over the steps: the middle of the layers and their extremes."""

from __future__ import annotations

from ...attention.metrics import Direction, Metric
from .common import (
    BLUE,
    GREY,
    ORANGE,
    Figure,
    edge_axis,
    edge_markers,
    layout,
    line,
    step_axis,
    value_axis,
)

AGGREGATED = frozenset({"nmse", "cosine"})
"""Metrics whose median and worst layer the server keeps per step."""


def build(metric: Metric) -> Figure:
    """Median over the layers, and the worst layer where the metric has a better side."""
    matrix = f"layer_steps.{metric.name}"
    if metric.name in AGGREGATED:
        worst = f"steps.{metric.name}_worst"
        traces = [
            line("median", "steps.step", f"finite(steps.{metric.name}_median)", BLUE),
            line("worst layer", "steps.step", f"finite({worst})", ORANGE),
            *edge_markers("worst layer", worst, ORANGE, log=metric.log),
        ]
    else:
        low, high = f"min({matrix})", f"max({matrix})"
        lower_is_worse = metric.direction is Direction.HIGHER
        higher_is_worse = metric.direction is Direction.LOWER
        traces = [
            line("median", "steps.step", f"median({matrix})", BLUE),
            line("smallest", "steps.step", low, ORANGE if lower_is_worse else GREY, dash="dot"),
            line("largest", "steps.step", high, ORANGE if higher_is_worse else GREY, dash="dot"),
        ]
    return {
        "data": traces,
        "layout": layout(
            xaxis=step_axis(),
            yaxis=value_axis(metric.title, log=metric.log, unit=metric.unit),
            yaxis2=edge_axis(),
        ),
    }
