"""The report of ``attnscope evaluate``: one HTML file that needs nothing else."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluation_summary import MEASURED, Median

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "frontend/node_modules/plotly.js-strict-dist-min/plotly-strict.min.js"

COLUMNS = (
    ("configuration", "configuration"), ("case", "case"), ("layer", "layer"), ("step", "step"),
    ("sigma", "sigma"), ("tokens", "tokens"), ("logit_std", "logit std"), ("nmse", "NMSE"),
    ("cosine", "cosine"), ("log_mass_bias", "log-mass bias"), ("ms", "ms"),
    ("exact_ms", "exact ms"), ("time_ratio", "time ÷ exact"), ("flops", "FLOP"),
    ("flops_ratio", "FLOP ÷ exact"), ("queries", "queries"), ("reference", "reference"),
    ("reason", "exact instead because"),
)  # fmt: skip

ROUNDING = 1e-9
"""Errors below this are those of float32, and would squeeze all others on a logarithmic axis."""

_LEGEND_WIDTH = 44


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
    places = list(dict.fromkeys(row["case"] for row in rows))
    short = _short(places)
    by_place = {(row["case"], row["configuration"]): row for row in measured}

    def column(place: str, name: str, field: str) -> Any:
        value = by_place.get((place, name), {}).get(field)
        if not isinstance(value, float) or (field == "nmse" and value < ROUNDING):
            return None
        return value

    def lines(field: str) -> list[dict[str, Any]]:
        return [
            {
                "type": "scatter", "mode": "lines+markers", "name": _wrapped(name), "x": short,
                "y": [column(place, name, field) for place in places],
            }
            for name in names
        ]  # fmt: skip

    def against(field: str) -> list[dict[str, Any]]:
        return [
            {
                "type": "scatter", "mode": "markers", "name": _wrapped(name),
                "x": [column(place, name, field) for place in places],
                "y": [column(place, name, "nmse") for place in places],
                "text": short,
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
        "title": {"text": title}, "height": 540, "margin": {"l": 50, "r": 10, "t": 20, "b": 40},
        "xaxis": {"automargin": True, **x}, "yaxis": {"automargin": True, **y},
        # Above the plot: below it, the names of the calls need the room.
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "showlegend": True, "hovermode": "closest",
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _short(places: Sequence[str]) -> list[str]:
    """Names of calls without what all of them have in common: run, number of the call, suffix."""
    short = [place.removesuffix(".safetensors") for place in places]
    if all(place.endswith(".call0") for place in short):
        short = [place.removesuffix(".call0") for place in short]
    if len({place.partition(" ")[0] for place in short}) == 1 and all(" " in p for p in short):
        short = [place.partition(" ")[2] for place in short]
    return short


def _wrapped(name: str) -> str:
    """A legend's text in lines; commas are where it may break."""
    lines = textwrap.wrap(name.replace(",", ", "), _LEGEND_WIDTH, break_long_words=False)
    return "<br>".join(html.escape(line.replace(", ", ",")) for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        # A long configuration breaks behind its commas.
        escaped = (html.escape(cell).replace(",", ",<wbr>") for cell in cells)
        inside = "".join(f"<{tag}>{cell}</{tag}>" for cell in escaped)
        return f"<tr>{inside}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="wide"><table><thead>{line("th", head)}</thead><tbody>\n{body}\n'
        "</tbody></table></div>"
    )


def page(rows: Sequence[dict[str, Any]], medians: Sequence[Median], plotly: str) -> str:
    """The whole report.

    Args:
        rows: see `figures`.
        medians: of these outcomes.
        plotly: text of plotly.js.
    """
    calls = _table(
        [title for _, title in COLUMNS],
        [[_text(row[name]) for name, _ in COLUMNS] for row in rows],
    )
    summary = _table(
        ["configuration", "tokens", "at", "logit std", "calls", "exact instead"]
        + [title.replace("GFLOP", "FLOP") for _, title, _ in MEASURED],
        [
            [row.configuration, str(row.tokens), row.at, _text(row.logit_std), str(row.calls),
             str(row.exact_instead)] + [_text(row.medians[name]) for name, _, _ in MEASURED]
            for row in medians
        ],
    )  # fmt: skip
    drawn = figures(rows)
    divs = "".join(
        f'<h2>{html.escape(figure["layout"]["title"]["text"])}</h2><div id="figure{number}"></div>'
        for number, figure in enumerate(drawn)
    )
    # "</" would end the script that the text stands in.
    data = json.dumps(drawn, ensure_ascii=False).replace("</", "<\\/")
    script = plotly.replace("</script", "<\\/script")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>AttnScope evaluation</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<style>{_STYLE}</style></head>
<body><h1>AttnScope evaluation</h1>
<h2>Medians</h2>
{summary}
<p>Errors below {ROUNDING:g}, which are those of rounding, are left out of the charts.</p>
{divs}
<h2>Calls</h2>
{calls}
<script>{script}</script>
<script>
const figures = {data}
const dark = matchMedia('(prefers-color-scheme: dark)')
function draw() {{
  const style = getComputedStyle(document.body)
  const line = style.getPropertyValue('--line')
  for (const [number, {{data, layout}}] of figures.entries()) {{
    const axis = {{gridcolor: line, zerolinecolor: line, linecolor: line}}
    Plotly.react('figure' + number, data, {{
      ...layout, title: undefined, paper_bgcolor: 'transparent', plot_bgcolor: 'transparent',
      font: {{color: style.color, family: 'system-ui', size: 12}},
      xaxis: {{...layout.xaxis, ...axis}}, yaxis: {{...layout.yaxis, ...axis}},
    }}, {{responsive: true, displaylogo: false}})
  }}
}}
dark.addEventListener('change', draw)
draw()
</script></body></html>
"""


_STYLE = """:root{color-scheme:light dark;--line:#e2e8f0}
@media (prefers-color-scheme:dark){:root{--line:#2a384f}body{background:#0f172a;color:#cbd5e1}}
body{font:14px/1.5 system-ui;margin:clamp(.75rem,3vw,2rem)}h1{font-size:1.4rem}h2{font-size:1.1rem}
.wide{overflow:auto;max-height:80vh}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{position:sticky;top:0;background:Canvas}
@media (prefers-color-scheme:dark){thead th{background:#0f172a}}
td:first-child,th:first-child,td:nth-child(18){text-align:left}
td:first-child{min-width:9rem;max-width:18rem;white-space:normal;overflow-wrap:anywhere}"""


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return format(value, ".4g") if isinstance(value, float) else str(value)
