"""The regime of the logits: what decides whether a power series can follow the exponential."""

from __future__ import annotations

from ...attention.metrics import Metric
from .common import (
    BAND,
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


def build(_: Metric) -> Figure:
    """1st to 99th percentile of q·k over all layers as a band, and the median layer's spread."""
    low = line("1st percentile, least layer", "steps.step", "finite(steps.qk_p01_min)", GREY)
    high = line(
        "99th percentile, greatest layer",
        "steps.step",
        "finite(steps.qk_p99_max)",
        BLUE,
        fill="tonexty",
        fillcolor=BAND,
    )
    spread = line(
        "standard deviation, median layer", "steps.step", "finite(steps.qk_std_median)", ORANGE
    )
    edges = [
        *edge_markers("1st percentile", "steps.qk_p01_min", GREY, log=False),
        *edge_markers("99th percentile", "steps.qk_p99_max", BLUE, log=False),
    ]
    return {
        "data": [low, high, spread, *edges],
        "layout": layout(
            xaxis=step_axis(),
            yaxis=value_axis("scaled logit q·k"),
            yaxis2=edge_axis(),
            shapes=[
                {
                    "type": "line",
                    "xref": "paper",
                    "x0": 0,
                    "x1": 1,
                    "y0": 1,
                    "y1": 1,
                    "line": {"color": ORANGE, "width": 1, "dash": "dot"},
                    "label": {
                        "text": "degree 2 follows to about here (standard deviation 1)",
                        "textposition": "end",
                        "font": {"size": 11, "color": ORANGE},
                    },
                }
            ],
        ),
    }
