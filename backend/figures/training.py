"""Figures of a student's training over the numbers of its updates.

They are bound to a window into the series, which the server has put into buckets, and not to a
run's columns: ``meta.bind`` of a trace names

- a path into `TrainingWindow`: ``layers``, ``start``, ``heatmap``, ``bands.p50``;
- ``middle``: the middle of each bucket;
- ``log10(E)``: logarithms of the positive values, null for all others;
- ``cells_x``, ``cells_y``: bucket and layer of each cell that held NaN or infinity.

So the page asks for the buckets that have grown, or for a narrower window, and the definition
stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from ...attention.metrics import Direction, Metric
from .common import BAND, BLUE, GREY, ORANGE, RED, Figure, Trace, layout, line, value_axis
from .heatmap import DECADES

TrainingFigure = Literal["heatmap", "bands"]


def build(name: TrainingFigure, run_id: str, metric: Metric) -> Figure:
    """A figure without numbers."""
    figure = _heatmap(metric) if name == "heatmap" else _bands(metric)
    figure["layout"]["uirevision"] = f"{run_id}:training:{metric.name}"
    figure["layout"]["meta"] = {"figure": f"training-{name}", "metric": metric.name}
    return figure


def _update_axis() -> dict[str, Any]:
    return {"title": {"text": "update of the layer"}, "zeroline": False}


def _heatmap(metric: Metric) -> Figure:
    """One cell per layer and bucket, coloured by the value in it that wants attention."""
    shown = f"{metric.title}{f' ({metric.unit})' if metric.unit else ''}"
    bar: dict[str, Any] = {"title": {"text": shown, "side": "right"}, "thickness": 14}
    if metric.log:
        bar.update(
            tickvals=list(DECADES),
            ticktext=[f"1e{power}" if power else "1" for power in DECADES],
        )
    higher = metric.direction is Direction.HIGHER
    cells: Trace = {
        "type": "heatmap",
        "name": metric.title,
        "colorscale": "Viridis",
        "reversescale": higher,
        "colorbar": bar,
        "hoverongaps": False,
        "hovertemplate": "update %{x}<br>%{y}<br>"
        + ("smallest " if higher else "largest ")
        + shown
        + " %{customdata:.4g}<extra></extra>",
        "meta": {
            "bind": {
                "x": "middle",
                "y": "layers",
                "z": "log10(heatmap)" if metric.log else "heatmap",
                "customdata": "heatmap",
            }
        },
    }
    marks: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "NaN or infinite",
        "marker": {"symbol": "x", "size": 7, "color": RED},
        "hovertemplate": "update %{x}<br>%{y}<br>NaN or infinite<extra></extra>",
        "meta": {"bind": {"x": "cells_x", "y": "cells_y"}, "optional": True},
    }
    return {
        "data": [cells, marks],
        "layout": layout(
            hovermode="closest",
            xaxis={**_update_axis(), "showgrid": False},
            yaxis={
                "type": "category",
                "autorange": "reversed",
                "showgrid": False,
                "automargin": True,
                "title": {"text": "layer"},
            },
        ),
    }


def _bands(metric: Metric) -> Figure:
    """Median layer, the tenth to the ninetieth percentile as a band, and the extremes."""
    worse_high = metric.direction is Direction.LOWER
    worse_low = metric.direction is Direction.HIGHER

    def extreme(name: str, column: str, worse: bool) -> Trace:
        return line(name, "middle", column, ORANGE if worse else GREY, mode="lines", dash="dot")

    low = line("10th percentile", "middle", "bands.p10", BLUE, mode="lines")
    high = line("90th percentile", "middle", "bands.p90", BLUE, mode="lines")
    low["line"] = {"color": BLUE, "width": 0.5}
    high["line"] = {"color": BLUE, "width": 0.5}
    high |= {"fill": "tonexty", "fillcolor": BAND}
    middle = line("median layer", "middle", "bands.p50", BLUE, mode="lines")
    return {
        "data": [
            low,
            high,
            extreme("smallest", "bands.low", worse_low),
            extreme("largest", "bands.high", worse_high),
            middle,
        ],
        "layout": layout(
            xaxis=_update_axis(),
            yaxis=value_axis(metric.title, log=metric.log, unit=metric.unit),
        ),
    }


def fill(figure: Figure, window: Mapping[str, Any]) -> Figure:
    """The same figure with the numbers of a window; optional traces that are empty left out."""
    traces = []
    for trace in figure["data"]:
        meta = trace["meta"]
        values = {target: _value(text, window) for target, text in meta["bind"].items()}
        if meta.get("optional") and not any(len(value) for value in values.values()):
            continue
        traces.append({**trace, **values})
    return {"data": traces, "layout": figure["layout"]}


def _value(expression: str, window: Mapping[str, Any]) -> Any:
    if expression.startswith("log10("):
        return [[_log10(v) for v in row] for row in _value(expression[6:-1], window)]
    if expression == "middle":
        return [start + (window["width"] - 1) / 2 for start in window["start"]]
    if expression == "cells_x":
        middle = _value("middle", window)
        return [middle[column] for _, column, _ in window["nonfinite"]]
    if expression == "cells_y":
        return [window["layers"][row] for row, _, _ in window["nonfinite"]]
    value: Any = window
    for part in expression.split("."):
        value = value[part]
    return value


def _log10(value: float | None) -> float | None:
    return math.log10(value) if value is not None and value > 0 else None
