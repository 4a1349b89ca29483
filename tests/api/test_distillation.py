"""Updates of students through the API: stored once, packed, looked at, exported, deleted."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import plotly.graph_objects
import pytest
from sqlalchemy import func, select
from support.events import INF, NAN, READY_BELOW, RunScript, training_value

from attnscope.attention.distillation import (
    STUDENT_EVENT_DESCRIPTIONS,
    TRAINING_METRIC_NAMES,
    StudentEvent,
)
from attnscope.backend import exporting, importing
from attnscope.db import student_models
from attnscope.db.student_blocks import BLOCK

TABLES = (
    student_models.Training.__table__,
    student_models.StudentBatch.__table__,
    student_models.StudentLayer.__table__,
    student_models.StudentReadiness.__table__,
    student_models.StudentEventRow.__table__,
    student_models.student_updates,
    student_models.StudentBlock.__table__,
)


def counts(api: Any) -> dict[str, int]:
    """Rows of each table."""
    with api.services.store.read() as session:
        return {t.name: session.scalar(select(func.count()).select_from(t)) for t in TABLES}


def path(script: RunScript, rest: str = "") -> str:
    return f"/runs/{script.run_id}/distillation{rest}"


def trained(api: Any, updates: int, layers: int = 3, each: int = 40, **options: Any) -> RunScript:
    """A run whose layers have had updates 1 to so many."""
    script = RunScript(layers=layers, variant="ttr", **options)
    events: list[Any] = [script.started()]
    for begin in range(1, updates + 1, each):
        events.append(script.updates(range(begin, min(begin + each, updates + 1))))
    for start in range(0, len(events), 20):
        api.send(*events[start : start + 20])
    return script


def series(api: Any, script: RunScript, **params: Any) -> Any:
    return api.get(path(script, "/series"), **params)


def test_updates_are_told_layer_by_layer(api: Any) -> None:
    script = trained(api, 100)
    made = api.get(path(script))
    totals = made["totals"]
    assert totals["updates"] == 300 and totals["ready"] == 0
    assert totals["replay_bytes"] == 600_000.0 and totals["replay_limit_bytes"] == 1_000_000
    # three events a quarter of a second apart; the first one's updates were made before it
    assert totals["updates_per_second"] == pytest.approx((120 + 60) / 0.5)
    assert [layer["layer"] for layer in made["layers"]] == script.layers
    for index, layer in enumerate(made["layers"]):
        assert (layer["updates"], layer["first_update"], layer["last_update"]) == (100, 1, 100)
        for name in TRAINING_METRIC_NAMES:
            expected = training_value(name, 100, index)
            if expected is None:
                assert name not in layer["latest"]
            else:
                assert layer["latest"][name] == pytest.approx(expected)
    assert made["seq"] == api.get("/health")["latest_seq"]


@pytest.mark.parametrize("updates", [37, BLOCK - 1, BLOCK, 2 * BLOCK + 300])
def test_packed_and_new_updates_make_one_series(api: Any, updates: int) -> None:
    script = trained(api, updates)
    packed = counts(api)["student_updates"]
    assert packed == 3 * (updates % BLOCK)
    for metric in ("loss", "nmse"):
        found = series(api, script, metric=metric, width=1, part="lines")
        assert found["width"] == 1 and found["start"] == list(range(1, updates + 1))
        for row in range(3):
            expected = [training_value(metric, number, row) for number in found["start"]]
            for part in ("low", "high", "first", "last"):
                for one, other in zip(found["lines"][part][row], expected, strict=True):
                    assert (one is None) == (other is None)
                    assert one is None or one == pytest.approx(other, rel=1e-6)
    measured = updates // 10 * 3
    assert sum(series(api, script, metric="nmse")["counts"]) == measured
    assert sum(series(api, script, metric="attention_kl")["counts"]) == 0


def test_a_window_has_the_spike_and_says_how_much_it_stands_for(api: Any) -> None:
    script = RunScript(layers=2, variant="ttr")
    loss = [1.0] * 6000
    loss[4321] = 77.0
    loss[4500], loss[4501], loss[20] = NAN, INF, -INF
    api.send(script.started(), script.updates(range(1, 3001), loss=loss))
    whole = series(api, script, metric="loss", points=50)
    assert whole["width"] == 64 and sum(whole["counts"]) == whole["updates"] == 6000
    assert len(whole["start"]) <= 50
    # number 4321 in the event is update 2161 of the second layer
    column = 2161 // 64
    assert whole["heatmap"][1][column] == 77.0 and max(whole["heatmap"][0]) == 1.0
    assert whole["bands"]["high"][column] == 77.0 and whole["bands"]["layers"][column] == 2
    assert sorted(whole["nonfinite"]) == [
        [0, 11 // 64, 1],
        [0, 2251 // 64, 1],
        [1, 2251 // 64, 1],
    ]
    zoomed = series(api, script, metric="loss", from_update=2100, to_update=2200, points=200)
    assert zoomed["width"] == 1 and zoomed["start"] == list(range(2100, 2201))
    assert zoomed["counts"] == [2] * 101
    assert zoomed["lines"]["high"][1][2161 - 2100] == 77.0
    one = series(api, script, metric="loss", layer="single.1", points=50, part="lines")
    assert one["layers"] == ["single.1"] and one["heatmap"] is None
    assert api.get(path(script))["totals"]["nonfinite"] == 3
    # what has grown since is asked for alone, in the same buckets
    later = series(api, script, metric="loss", width=64, from_update=2990)
    assert later["start"] == whole["start"][-2:] or later["start"] == whole["start"][-1:]
    assert later["heatmap"][0] == whole["heatmap"][0][-len(later["start"]) :]


def test_a_metric_that_comes_at_every_tenth_update_leaves_no_stripes(api: Any) -> None:
    script = trained(api, 300)
    found = series(api, script, metric="nmse", points=1000)
    assert found["width"] == 16 and sum(found["counts"]) == 3 * 30
    assert all(count > 0 for count in found["counts"][1:])
    assert series(api, script, metric="loss", points=1000)["width"] == 1


def test_sending_twice_changes_nothing(api: Any) -> None:
    script = RunScript(layers=2, variant="ttr")
    events = [
        script.started(),
        script.updates(range(1, BLOCK + 5)),
        script.happened("out_of_memory", "single.0", 5, detail="64 → 32"),
    ]
    api.send(*events)
    before, rows = api.get(path(script)), counts(api)
    api.send(*events)
    api.send(*events[1:])
    after = api.get(path(script))
    assert {**after, "seq": 0} == {**before, "seq": 0} and counts(api) == rows


def test_numbers_that_jump_or_go_back_keep_their_place(api: Any) -> None:
    script = RunScript(layers=1, variant="ttr")
    numbers = [*range(500, 500 + BLOCK), *range(600, 700), 5000]
    api.send(script.started(), script.updates(numbers))
    found = series(api, script, metric="loss", part="lines", points=4000, from_update=600)
    assert found["first_update"] == 500 and sum(found["counts"]) == BLOCK - 100 + 101
    odd = RunScript(layers=1, variant="ttr")
    order = [*range(1, 600), *range(100, 100 + BLOCK)]
    api.send(odd.started(), odd.updates(order))
    found = series(api, odd, metric="loss", part="lines", points=4000)
    assert sum(found["counts"]) == len(order)
    shown = {
        start: value
        for start, value in zip(found["start"], found["lines"]["low"][0], strict=True)
        if value is not None
    }
    assert set(shown) == set(order)


def test_readiness_has_a_history(api: Any) -> None:
    script = RunScript(layers=2, variant="ttr")
    first, second = script.layers
    ready = [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    api.send(script.started(), script.updates(range(1, 7), layers=[first], ready=ready))
    layer = api.get(path(script))["layers"][0]
    spans = [(item["from_update"], item["to_update"]) for item in layer["intervals"]]
    assert spans == [(3, 5), (6, None)] and layer["ready"]
    # the event about a change and the updates that show it may come in either order
    api.send(
        script.happened("ready", second, 40),
        script.updates(range(30, 42), layers=[second], ready=[0.0] * 10 + [1.0] * 2),
        script.happened("not_ready", second, 50),
    )
    made = api.get(path(script))
    spans = [(i["from_update"], i["to_update"]) for i in made["layers"][1]["intervals"]]
    assert spans == [(40, 50)] and made["totals"]["ready"] == 1
    # a student that was built anew begins below
    api.send(script.happened("recovered"), script.happened("ready", second, 20))
    spans = [
        (i["from_update"], i["to_update"]) for i in api.get(path(script))["layers"][1]["intervals"]
    ]
    assert spans == [(40, 50), (20, None)]


@pytest.mark.parametrize("each", [5, 300])
def test_a_revision_has_its_place_among_the_updates(api: Any, each: int) -> None:
    script = RunScript(layers=2, variant="ttr")
    events = [script.started()]
    for step in range(8):
        numbers = range(step * each + 1, (step + 1) * each + 1)
        events.append(script.updates(numbers, step=step))
    api.send(*events)
    pushed = api.client.put(
        f"/api/v1/runs/{script.run_id}/settings",
        json={"base_revision": 0, "settings": {"training_paused": True}},
    ).json()
    assert api.get(path(script))["marks"] == []
    api.send(script.report(pushed["id"], "applied", 5))
    marks = api.get(path(script))["marks"]
    assert marks == [{"revision": 1, "step": 5, "update": 5 * each + 1}]


def test_events_come_in_pages_with_their_words(api: Any) -> None:
    script = RunScript(layers=1, variant="ttr")
    kinds = [event.value for event in StudentEvent]
    api.send(script.started(), *(script.happened(kind, detail=f"about {kind}") for kind in kinds))
    page = api.get(path(script, "/events"), limit=4)
    assert [item["event"] for item in page["items"]] == kinds[:4] and page["more"]
    rest = api.get(path(script, "/events"), after=page["items"][-1]["seq"])
    assert [item["event"] for item in rest["items"]] == kinds[4:] and not rest["more"]
    assert rest["items"][0]["detail"] == f"about {kinds[4]}" and rest["items"][0]["layer"] is None
    assert api.get(path(script))["totals"]["events"] == dict.fromkeys(kinds, 1)
    words = api.get("/schema/metrics")
    assert words["student_events"] == STUDENT_EVENT_DESCRIPTIONS
    assert [metric["name"] for metric in words["training"]] == list(TRAINING_METRIC_NAMES)


def test_figures_are_defined_once_and_filled_from_a_window(api: Any) -> None:
    script = RunScript(layers=2, variant="ttr")
    loss = [1.0] * 200
    loss[10], loss[11], loss[13] = 0.0, NAN, 100.0
    api.send(script.started(), script.updates(range(1, 101), loss=loss))
    window = series(api, script, metric="loss", points=60)
    url = path(script, "/figures/heatmap")
    bare = api.get(url, metric="loss", data=0)
    assert all("z" not in trace for trace in bare["data"])
    cells, marks = api.get(url, metric="loss", points=60)["data"]
    assert cells["x"] == [start + 0.5 for start in window["start"]]
    assert cells["customdata"] == window["heatmap"] and cells["y"] == window["layers"]
    column = 7 // 2 - 1 // 2
    assert cells["customdata"][1][column] == 100.0 and cells["z"][1][column] == 2.0
    assert marks["y"] == ["single.1"] and marks["x"] == [window["start"][6 // 2] + 0.5]
    for name in ("heatmap", "bands"):
        for metric in TRAINING_METRIC_NAMES:
            drawn = api.get(path(script, f"/figures/{name}"), metric=metric)
            plotly.graph_objects.Figure(
                data=[{k: v for k, v in t.items() if k != "meta"} for t in drawn["data"]],
                layout=drawn["layout"],
            )
    bands = {t["name"]: t for t in api.get(path(script, "/figures/bands"), metric="loss")["data"]}
    assert max(bands["largest"]["y"]) == 100.0
    assert bands["median layer"]["x"][0] == 1


def test_a_run_without_training_says_so(api: Any) -> None:
    script = RunScript(layers=2)
    api.send(script.started())
    made = api.get(path(script))
    assert made["totals"]["updates"] == 0 and made["layers"] == []
    found = series(api, script)
    assert found["start"] == [] and found["counts"] == [] and found["layers"] == []


def test_wrong_questions_get_clear_answers(api: Any) -> None:
    script = trained(api, 20)
    url = path(script, "/series")
    problem = api.problem("GET", f"{url}?metric=bogus", 422)
    assert problem["errors"][0]["field"] == "metric" and "nmse_ema" in problem["detail"]
    for query, field in (
        ("points=1", "points"),
        ("points=5000", "points"),
        ("width=3", "width"),
        ("from_update=9&to_update=8", "to_update"),
        ("part=pie", "part"),
    ):
        problem = api.problem("GET", f"{url}?{query}", 422)
        assert problem["errors"][0]["field"].startswith(field), problem
    assert "double.99" in api.problem("GET", f"{url}?layer=double.99", 404)["detail"]
    api.problem("GET", f"/runs/{'0' * 32}/distillation", 404)
    wide = RunScript(layers=1, variant="ttr")
    api.send(wide.started(), wide.updates([1, 2_000_000]))
    problem = api.problem("GET", f"{path(wide, '/series')}?width=1", 422)
    assert problem["errors"][0]["field"] == "width" and "1000000" in problem["detail"]


def test_a_metric_that_is_unknown_is_refused_whole(api: Any) -> None:
    script = RunScript(layers=1, variant="ttr")
    response = api.post(script.started(), script.updates([1], bogus=[1.0]))
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "events.1.updates.metrics.bogus"
    api.problem("GET", f"/runs/{script.run_id}", 404)


def test_the_feed_tells_totals_once_per_batch(api: Any) -> None:
    script = trained(api, 40)
    api.send(script.updates(range(41, 51)), script.updates(range(51, 61)))
    items = [i for i in api.get("/changes")["items"] if i["kind"] == "training"]
    assert len(items) == 1 and items[0]["data"]["updates"] == 180
    assert items[0]["data"] == api.get(path(script))["totals"]


def test_a_deleted_run_leaves_nothing(api: Any) -> None:
    script = trained(api, BLOCK + 100)
    api.send(script.happened("ready", "single.0", 40), script.ended())
    assert all(count > 0 for count in counts(api).values())
    assert api.client.delete(f"/api/v1/runs/{script.run_id}").status_code == 204
    assert set(counts(api).values()) == {0}


def test_training_survives_an_export_and_an_import(api: Any, make_api: Any) -> None:
    script = RunScript(layers=3, variant="ttr")
    events: list[Any] = [script.started(), script.happened("checkpoint_loaded", detail="x")]
    for begin in range(1, 2 * BLOCK, 90):
        loss = [NAN if n % 97 == 0 else INF if n % 89 == 0 else 1.0 / (n + 1) for n in range(270)]
        events.append(script.updates(range(begin, begin + 90), step=begin // 90, loss=loss))
    events.append(script.happened("training_off", step=3, detail="no memory"))
    events.append(script.step(0))
    events.append(script.ended())
    for start in range(0, len(events), 9):
        api.send(*events[start : start + 9])
    file = BytesIO()
    exporting.export(api.services.store, file)
    other = make_api("other")
    file.seek(0)
    importing.import_lines(other.services, file)

    def view(of: Any) -> Any:
        made = of.get(path(script))
        windows = [
            series(of, script, metric=name, points=4000, part="lines")
            for name in ("loss", "nmse", "ready")
        ]
        for window in windows:
            del window["seq"]
        happened = of.get(path(script, "/events"))
        return made["totals"], made["layers"], windows, happened

    mine, theirs = view(api), view(other)
    for layers in (mine[1], theirs[1]):
        for layer in layers:
            layer["latest"] = {
                k: v if isinstance(v, str) else pytest.approx(v, rel=1e-6)
                for k, v in layer["latest"].items()
            }
    assert theirs[0] == mine[0]
    assert theirs[1:] == mine[1:] or all(a == b for a, b in zip(theirs[1:], mine[1:], strict=True))
    again = BytesIO()
    exporting.export(other.services.store, again)
    one, two = file.getvalue().splitlines()[2:], again.getvalue().splitlines()[2:]
    assert two == one
    # a second time, and onto the first half of the run, it changes nothing
    rows = counts(other)
    file.seek(0)
    importing.import_lines(other.services, file)
    assert counts(other) == rows
    half = make_api("half")
    half.send(*events[: len(events) // 2])
    file.seek(0)
    importing.import_lines(half.services, file)
    assert half.get(path(script))["totals"] == mine[0]


def test_what_the_made_up_training_comes_to() -> None:
    assert training_value("ready", 2000, 0) == 1.0
    error = training_value("nmse_ema", 2000, 0)
    assert error is not None and error <= READY_BELOW and math.isfinite(error)
