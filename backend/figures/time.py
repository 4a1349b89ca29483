"""Where the time goes."""

from __future__ import annotations

from ...attention.metrics import Metric
from .common import BLUE, GREY, Figure, layout, line, step_axis, value_axis


def build(_: Metric) -> Figure:
    """Time of each step, and the part of it that attention took."""
    step_time = line("step", "steps.step", "finite(steps.duration_ms)", GREY)
    attention = line("attention", "steps.step", "finite(steps.attn_ms)", BLUE, fill="tozeroy")
    yaxis = {**value_axis("time", unit="ms"), "rangemode": "tozero"}
    return {
        "data": [step_time, attention],
        "layout": layout(xaxis=step_axis(), yaxis=yaxis),
    }
