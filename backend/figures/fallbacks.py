"""Why calls ran exactly, step by step."""

from __future__ import annotations

from typing import Any

from ...attention.metrics import Metric
from ...attention.reasons import DESCRIPTIONS, Fallback, Gate
from .common import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    OLIVE,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    TEAL,
    Figure,
    Trace,
    layout,
    step_axis,
    value_axis,
)

FALLBACK_COLORS = (RED, ORANGE, PINK, PURPLE, BROWN, BLUE, TEAL, OLIVE, GREEN)
GATE_COLORS = (GREY, TEAL, BLUE, GREEN, PURPLE, OLIVE, BROWN, PINK)


def build(_: Metric) -> Figure:
    """Stacked calls per reason: fallbacks filled, gates hatched, since a gate is no failure."""
    fallbacks = [
        _bars("fallback", reason.value, FALLBACK_COLORS[index % len(FALLBACK_COLORS)])
        for index, reason in enumerate(Fallback)
    ]
    gates = [
        _bars("gate", reason.value, GATE_COLORS[index % len(GATE_COLORS)])
        for index, reason in enumerate(Gate)
    ]
    return {
        "data": [*fallbacks, *gates],
        "layout": layout(barmode="stack", xaxis=step_axis(), yaxis=value_axis("calls")),
    }


def _bars(kind: str, reason: str, color: str) -> Trace:
    marker: dict[str, Any] = {"color": color, "line": {"width": 0}}
    if kind == "gate":
        marker["pattern"] = {"shape": "/", "fillmode": "overlay", "size": 6}
        marker["opacity"] = 0.6
    return {
        "type": "bar",
        "name": f"{kind}: {reason.replace('_', ' ')}",
        "marker": marker,
        "hovertemplate": f"%{{y}} calls: {DESCRIPTIONS[reason]}<extra></extra>",
        "meta": {
            "bind": {"x": "steps.step", "y": f"reasons.{kind}.{reason}"},
            "optional": True,
        },
    }
