"""The report of ``attnscope evaluate``: one HTML file that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "frontend/node_modules/plotly.js-strict-dist-min/plotly-strict.min.js"

COLUMNS = (
    ("case", "case"), ("layer", "layer"), ("step", "step"), ("sigma", "sigma"),
    ("tokens", "tokens"), ("logit_std", "logit std"),
    ("configuration", "configuration"), ("nmse", "NMSE"), ("cosine", "cosine"),
    ("log_mass_bias", "log-mass bias"), ("ms", "ms"), ("exact_ms", "exact ms"),
    ("time_ratio", "time ÷ exact"), ("flops", "FLOP"), ("flops_ratio", "FLOP ÷ exact"),
    ("queries", "queries"), ("reference", "reference"), ("reason", "exact instead because"),
)  # fmt: skip


class PlotlyMissing(ValueError):
    """The page's plotly.js isn't there; the message says how to get it."""


def plotly_script(bundle: Path = BUNDLE) -> str:
    """The plotly.js that the page uses.

    Raises:
        PlotlyMissing: it isn't installed.
    """
    try:
        return bundle.read_text("utf-8")
    except OSError:
        raise PlotlyMissing(
            f"--html needs the page's plotly.js, and {bundle} is not there: run `make page` (or "
            "`npm ci` in frontend/) once, or take --csv or --json"
        ) from None


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plotly figures of outcomes: error by case, error against time, bias by case.

    Args:
        rows: outcomes as dictionaries, in which what isn't finite stands as text.
    """
    measured = [row for row in rows if isinstance(row["nmse"], float)]
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    places = list(dict.fromkeys(_place(row) for row in rows))
    by_place = {(_place(row), row["configuration"]): row for row in measured}

    def column(place: str, name: str, field: str) -> Any:
        value = by_place.get((place, name), {}).get(field)
        return value if isinstance(value, float) else None

    def lines(field: str) -> list[dict[str, Any]]:
        return [
            {
                "type": "scatter", "mode": "lines+markers", "name": name, "x": places,
                "y": [column(place, name, field) for place in places],
            }
            for name in names
        ]  # fmt: skip

    def against(field: str) -> list[dict[str, Any]]:
        return [
            {
                "type": "scatter", "mode": "markers", "name": name,
                "x": [column(place, name, field) for place in places],
                "y": [column(place, name, "nmse") for place in places],
                "text": places,
            }
            for name in names
        ]  # fmt: skip

    error = {"type": "log", "title": {"text": "NMSE"}, "exponentformat": "power"}
    drawn = [_figure("Error by call", lines("nmse"), {}, error)]
    # Without times, which can be left out, the work is what errors stand against.
    field, title = "time_ratio", "time ÷ exact"
    if not any(isinstance(row["time_ratio"], float) for row in measured):
        field, title = "flops_ratio", "FLOP ÷ exact"
    axis = {"type": "log", "title": {"text": title}}
    drawn.append(_figure(f"Error against {title}", against(field), axis, error))
    bias = {"title": {"text": "log-mass bias"}, "zeroline": True}
    drawn.append(_figure("Log-mass bias by call", lines("log_mass_bias"), {}, bias))
    return drawn


def _figure(
    title: str, data: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any]
) -> dict[str, Any]:
    layout = {
        "title": {"text": title}, "height": 480, "margin": {"l": 80, "r": 20, "b": 80},
        "xaxis": {"automargin": True, **x}, "yaxis": {"automargin": True, **y},
        "legend": {"orientation": "h", "y": -0.3}, "hovermode": "closest",
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _place(row: dict[str, Any]) -> str:
    return str(row["case"])


def page(rows: Sequence[dict[str, Any]], plotly: str) -> str:
    """The whole report.

    Args:
        rows: see `figures`.
        plotly: text of plotly.js.
    """
    head = "".join(f"<th>{html.escape(title)}</th>" for _, title in COLUMNS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(_text(row[name]))}</td>" for name, _ in COLUMNS)
        + "</tr>"
        for row in rows
    )  # fmt: skip
    drawn = figures(rows)
    divs = "".join(f'<div id="figure{number}"></div>' for number in range(len(drawn)))
    # "</" would end the script that the text stands in.
    data = json.dumps(drawn, ensure_ascii=False).replace("</", "<\\/")
    script = plotly.replace("</script", "<\\/script")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>AttnScope evaluation</title>
<style>body{{font:14px/1.5 system-ui;margin:2rem}}table{{border-collapse:collapse}}
td,th{{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}}
td:nth-child(7),td:first-child,th:first-child,td:last-child{{text-align:left}}
.wide{{overflow-x:auto}}</style></head>
<body><h1>AttnScope evaluation</h1>
{divs}
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<script>{script}</script>
<script>
for (const [number, figure] of {data}.entries())
  Plotly.newPlot('figure' + number, figure.data, figure.layout, {{responsive: true}})
</script></body></html>
"""


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return format(value, ".4g") if isinstance(value, float) else str(value)
