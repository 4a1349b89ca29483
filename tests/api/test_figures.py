"""Figures are what plotly understands, bound and filled in, with nothing dropped."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest
from support.events import INF, NAN, RunScript

from attnscope.attention.metrics import METRIC_NAMES
from attnscope.backend import columns, figures
from attnscope.backend.figures import binding
from attnscope.backend.schemas import Columns
from attnscope.db import runs

NAMES = get_args(figures.FigureName)


def loaded(api: Any, script: RunScript) -> Columns:
    with api.services.store.read() as session:
        run = runs.find(session, script.run_id)
        assert run is not None
        return columns.of_run(session, run)


@pytest.fixture
def script(api: Any) -> RunScript:
    made = RunScript(layers=3, steps=3)
    api.send(
        made.started(),
        made.step(0, nmse=[0.1, NAN, 0.0], qk_p99=[1.0, INF, None], cosine=[0.9, -INF, NAN]),
        made.step(1, nmse=[0.001, INF, -1.0]),
        made.step(2, nmse=[None, None, None]),
    )
    return made


def check(text: str) -> Any:
    """A figure as plotly itself sees it, which refuses what it doesn't know."""
    import plotly.io

    return plotly.io.from_json(text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_plotly_takes_every_definition(name: Any, metric: str) -> None:
    figure = figures.build(name, "ab" * 16, metric)
    seen = check(json.dumps(figure))
    assert len(seen.data) == len(figure["data"])
    assert figure["layout"]["uirevision"] == f"{'ab' * 16}:{metric}"
    assert figure["layout"]["meta"]["markers"] is True
    assert "template" not in figure["layout"]
    for theme in ("font", "paper_bgcolor", "plot_bgcolor"):
        assert theme not in figure["layout"]
    for trace in figure["data"]:
        assert set(trace["meta"]["bind"]) <= set(binding.TARGETS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", [0, 1])
def test_the_route_gives_what_plotly_takes(
    api: Any, script: RunScript, name: str, data: int
) -> None:
    path = f"/runs/{script.run_id}/figures/{name}"
    text = api.client.get("/api/v1" + path, params={"data": data}).text
    figure = check(text)
    assert ("NaN" in text) == (data == 1 and name in ("heatmap", "quality")) or data == 0
    filled = [trace for trace in figure.data if trace.x is not None]
    assert bool(filled) == bool(data)


def test_the_heatmap_colours_by_logarithm_and_drops_nothing(api: Any, script: RunScript) -> None:
    figure = api.get(f"/runs/{script.run_id}/figures/heatmap", metric="nmse")
    cells, *marks = figure["data"]
    assert cells["y"] == script.layers
    assert cells["x"] == [0, 1, 2]
    assert cells["z"][0] == [pytest.approx(-1), pytest.approx(-3), None]
    assert cells["z"][1] == [None, None, None]
    assert cells["customdata"][0] == [0.1, 0.001, None]
    assert cells["customdata"][2] == [0.0, -1.0, None]
    found = {mark["name"]: list(zip(mark["x"], mark["y"], strict=True)) for mark in marks}
    _, second, third = script.layers
    assert found == {"NaN": [(0, second)], "+Inf": [(1, second)], "≤ 0": [(0, third), (1, third)]}


def test_values_without_a_place_on_the_axis_stand_at_its_edge(api: Any, script: RunScript) -> None:
    figure = api.get(f"/runs/{script.run_id}/figures/quality", metric="nmse")
    median, worst, *edges = figure["data"]
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert worst["y"] == [None, None, None]
    assert median["y"][2] is None
    assert [edge["name"] for edge in edges] == ["worst layer: NaN", "worst layer: +Inf"]
    assert edges[0]["x"] == [0] and edges[0]["y"] == [0.98] and edges[0]["yaxis"] == "y2"


def test_fallbacks_show_only_reasons_that_occurred(api: Any, script: RunScript) -> None:
    (bars,) = api.get(f"/runs/{script.run_id}/figures/fallbacks")["data"]
    assert bars["name"] == "fallback: denominator"
    assert bars["y"] == [3, 3, 3]


def test_an_unknown_metric_or_figure_is_refused(api: Any, script: RunScript) -> None:
    path = f"/runs/{script.run_id}/figures"
    problem = api.problem("GET", f"{path}/heatmap", 422, params={"metric": "magic"})
    assert problem["errors"][0]["field"] == "metric"
    assert api.problem("GET", f"{path}/pie", 422)["errors"][0]["field"] == "name"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("steps.step", [0, 1, 2]),
        ("finite(layer_steps.nmse)", [[0.1, 0.001, None], [None] * 3, [0.0, -1.0, None]]),
        ("median(layer_steps.q_norm)", [0.125, 1.125, 2.125]),
        ("max(layer_steps.q_norm)", [0.25, 1.25, 2.25]),
        ("min(layer_steps.q_norm)", [0.0, 1.0, 2.0]),
        ("min(layer_steps.nmse)", [0.0, -1.0, None]),
        ("where(steps.nmse_worst, inf, steps.step)", [1]),
        ("where(steps.nmse_worst, nan, 0.98)", [0.98]),
        ("cells_x(layer_steps.nmse, nonpositive)", [0, 1]),
    ],
)
def test_expressions(api: Any, script: RunScript, expression: str, value: Any) -> None:
    assert binding.evaluate(expression, loaded(api, script)) == value


def test_what_is_no_expression_is_refused(api: Any, script: RunScript) -> None:
    numbers = loaded(api, script)
    for text in ("magic(steps.step)", "median(steps.step", "somewhere.else"):
        with pytest.raises(ValueError, match="no "):
            binding.evaluate(text, numbers)
    with pytest.raises(binding.UnknownColumn):
        binding.evaluate("steps.nothing", numbers)
    assert [binding.kind_of(v) for v in (None, 1.0, 0.0, NAN, INF, -INF)] == [
        None, None, "nonpositive", "nan", "inf", "-inf",
    ]  # fmt: skip


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_are_legible_on_light_and_dark() -> None:
    from attnscope.backend.figures import common

    colors = [v for v in vars(common).values() if isinstance(v, str) and v.startswith("#")]
    assert len(colors) == 10
    for color in colors:
        value = luminance(color)
        assert (1.0 + 0.05) / (value + 0.05) >= 3.0, color
        assert (value + 0.05) / (luminance("#18181b") + 0.05) >= 3.0, color
    assert math.isfinite(value)
