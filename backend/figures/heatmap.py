"""Layers × steps, coloured by a metric."""

from __future__ import annotations

from typing import Any

from ...attention.metrics import Direction, Metric
from .common import GREY, KINDS, RED, Figure, Trace, layout, step_axis

DECADES = range(-12, 13)


def build(metric: Metric) -> Figure:
    """One cell per layer and step. On a log scale the colour is that of the logarithm; ticks and
    hover show the value itself. NaN, infinities and values without a logarithm get markers."""
    matrix = f"layer_steps.{metric.name}"
    traces = [_cells(metric, matrix)]
    kinds = list(KINDS)
    if metric.log:
        kinds.append(("nonpositive", "≤ 0", "circle-open"))
    traces.extend(_marks(matrix, kind, label, symbol) for kind, label, symbol in kinds)
    return {
        "data": traces,
        "layout": layout(
            hovermode="closest",
            xaxis={**step_axis(), "showgrid": False},
            yaxis={
                "type": "category",
                "autorange": "reversed",
                "showgrid": False,
                "automargin": True,
                "title": {"text": "layer"},
            },
        ),
    }


def _cells(metric: Metric, matrix: str) -> Trace:
    shown = f"{metric.title}{f' ({metric.unit})' if metric.unit else ''}"
    # the bright end of viridis is the side that wants attention
    bar: dict[str, Any] = {"title": {"text": shown, "side": "right"}, "thickness": 14}
    if metric.log:
        bar.update(
            tickvals=list(DECADES),
            ticktext=[f"1e{power}" if power else "1" for power in DECADES],
        )
    if metric.names:
        bar.update(tickvals=list(metric.names), ticktext=list(metric.names.values()))
    return {
        "type": "heatmap",
        "name": metric.title,
        "colorscale": "Viridis",
        "reversescale": metric.direction is Direction.HIGHER,
        "colorbar": bar,
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "step %{x}<br>%{y}<br>" + shown + " %{customdata:.4g}<extra></extra>",
        "meta": {
            "bind": {
                "x": "steps.step",
                "y": "layers",
                "z": f"log10({matrix})" if metric.log else f"finite({matrix})",
                "customdata": f"finite({matrix})",
            }
        },
    }


def _marks(matrix: str, kind: str, label: str, symbol: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label,
        "marker": {
            "symbol": symbol,
            "size": 8,
            "color": GREY if kind == "nonpositive" else RED,
            "line": {"width": 1, "color": RED},
        },
        "hovertemplate": "step %{x}<br>%{y}<br>" + label + "<extra></extra>",
        "meta": {
            "bind": {"x": f"cells_x({matrix}, {kind})", "y": f"cells_y({matrix}, {kind})"},
            "optional": True,
        },
    }
