"""Plotly figures, defined once: as the page binds them to live columns, and filled in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ...attention.metrics import BY_NAME, Metric
from ..schemas import Columns
from . import binding, fallbacks, heatmap, qk, quality, time
from .common import Figure

FigureName = Literal["heatmap", "quality", "fallbacks", "time", "qk"]

_BUILDERS: dict[str, Callable[[Metric], Figure]] = {
    "heatmap": heatmap.build,
    "quality": quality.build,
    "fallbacks": fallbacks.build,
    "time": time.build,
    "qk": qk.build,
}


def build(name: FigureName, run_id: str, metric: str) -> Figure:
    """A figure without numbers; ``meta.bind`` of each trace says what it draws."""
    figure = _BUILDERS[name](BY_NAME[metric])
    figure["layout"]["uirevision"] = f"{run_id}:{metric}"
    figure["layout"]["meta"] = {
        **figure["layout"].get("meta", {}),
        "markers": True,
        "figure": name,
        "metric": metric,
    }
    return figure


def fill(figure: Figure, columns: Columns) -> Figure:
    """The same figure with the numbers of a run; traces without any are left out."""
    traces: list[dict[str, Any]] = []
    for trace in figure["data"]:
        filled = binding.fill(trace, columns)
        if filled is not None:
            traces.append(filled)
    return {"data": traces, "layout": figure["layout"]}
