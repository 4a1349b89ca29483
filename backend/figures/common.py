"""What the figures share: colours, axes, layout."""

from __future__ import annotations

from typing import Any

Figure = dict[str, Any]
Trace = dict[str, Any]

# Mid lightness: at least 3:1 against white and against a near-black page. Fonts and papers are
# the page's theme.
BLUE = "#3b82c4"
ORANGE = "#d9761a"
RED = "#d64545"
GREEN = "#3a9463"
PURPLE = "#9566c9"
GREY = "#808894"
BROWN = "#a9714b"
TEAL = "#2a9299"
PINK = "#cf5a94"
OLIVE = "#8a8a2b"
GRID = "rgba(128, 136, 148, 0.25)"
BAND = "rgba(59, 130, 196, 0.18)"

KINDS: tuple[tuple[str, str, str], ...] = (
    ("nan", "NaN", "x"),
    ("inf", "+Inf", "triangle-up"),
    ("-inf", "−Inf", "triangle-down"),
)
"""Values that no axis has a place for: name in bindings, name for people, marker."""


def step_axis() -> dict[str, Any]:
    """The axis of steps."""
    return {"title": {"text": "step"}, "gridcolor": GRID, "zeroline": False, "rangemode": "normal"}


def value_axis(title: str, *, log: bool = False, unit: str = "") -> dict[str, Any]:
    """An axis of values; a log axis is plotly's own, the values stay what they are."""
    text = f"{title} ({unit})" if unit else title
    axis: dict[str, Any] = {"title": {"text": text}, "gridcolor": GRID, "zeroline": False}
    if log:
        axis.update(type="log", exponentformat="power", dtick=1)
    return axis


def layout(**more: Any) -> dict[str, Any]:
    """A figure's layout; theme colours are left to the page's template."""
    return {
        "autosize": True,
        "margin": {"l": 64, "r": 16, "t": 16, "b": 48},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        **more,
    }


def line(name: str, x: str, y: str, color: str, **more: Any) -> Trace:
    """A line whose gaps are gaps."""
    dash = more.pop("dash", "solid")
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "connectgaps": False,
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"color": color, "size": 5},
        "meta": {"bind": {"x": x, "y": y}},
        **more,
    }


def edge_axis() -> dict[str, Any]:
    """A hidden axis from 0 to 1 over the plot, for what has no place on the real one."""
    return {
        "overlaying": "y",
        "range": [0, 1],
        "visible": False,
        "fixedrange": True,
        "tickmode": "auto",
    }


def edge_markers(
    name: str, column: str, color: str, *, log: bool, axis: str = "y2"
) -> list[Trace]:
    """Markers at the plot's edge for values of a per-step column that the axis can't show."""
    kinds = list(KINDS)
    if log:
        kinds.append(("nonpositive", "≤ 0", "triangle-down-open"))
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"{name}: {label}",
            "yaxis": axis,
            "marker": {"symbol": symbol, "color": color, "size": 9, "line": {"width": 1}},
            "hovertemplate": f"{name} is {label}<extra></extra>",
            "showlegend": True,
            "cliponaxis": False,
            "meta": {
                "bind": {
                    "x": f"where({column}, {kind}, steps.step)",
                    "y": f"where({column}, {kind}, {'0.02' if low else '0.98'})",
                },
                "optional": True,
            },
        }
        for kind, label, symbol in kinds
        for low in (kind in ("-inf", "nonpositive"),)
    ]
