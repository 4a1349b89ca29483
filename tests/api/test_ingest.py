"""A batch is stored whole or not at all, and never twice."""

from __future__ import annotations

import gzip
import math
from typing import Any

import pytest
from support.events import INF, NAN, RunScript, batch_json, instance, png

from attnscope.attention.metrics import METRIC_NAMES


def test_a_run_from_beginning_to_end(api: Any) -> None:
    script = RunScript(layers=6, steps=4, label="first")
    answer = api.send(*script.whole())
    assert answer == {"durable": {script.run_id: 10}}

    run = api.get(f"/runs/{script.run_id}")
    assert run["status"] == "completed"
    assert run["label"] == "first"
    assert run["layers"] == script.layers
    assert (run["steps_total"], run["steps_done"], run["last_step"]) == (4, 4, 3)
    assert run["duration_ms"] == 4321.0
    assert run["fallback_share"] == 0.5
    assert run["gated_share"] == 0.0
    assert run["settings"] == script.settings
    assert (run["revision"], run["applied_revision"]) == (0, 0)
    assert run["nmse_worst"] == 0.1
    assert run["preview"] and run["final"]

    steps = api.get(f"/runs/{script.run_id}/steps")["items"]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert steps[0]["nmse_median"] == pytest.approx((1e-2 + 1e-3) / 2)
    assert steps[0]["worst_layer"] == script.layers[0]
    assert steps[0]["calls"] == 12
    assert steps[0]["attn_ms"] == pytest.approx(sum(0.125 * i for i in range(6)))

    rows = api.get(f"/runs/{script.run_id}/layer-steps", from_step=1, to_step=2)["items"]
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, layer) for step in (1, 2) for layer in script.layers
    ]
    assert set(rows[0]["metrics"]) == set(METRIC_NAMES)
    one = api.get(f"/runs/{script.run_id}/layer-steps", layer="single.1")["items"]
    assert {row["layer"] for row in one} == {"single.1"}

    why = api.get(f"/runs/{script.run_id}/fallbacks")
    assert why["totals"] == {"denominator": 24}
    assert why["items"][0]["detail"] == "2.1 % bad"


def test_a_batch_sent_twice_is_stored_once(api: Any) -> None:
    script = RunScript()
    items = script.whole()
    first = api.send(*items)
    before = api.get(f"/runs/{script.run_id}")
    latest = api.get("/health")["latest_seq"]
    assert api.send(*items) == first
    assert api.get(f"/runs/{script.run_id}") == before
    assert api.get("/health")["latest_seq"] == latest


def test_overlapping_batches_store_each_event_once(api: Any) -> None:
    script = RunScript(steps=6)
    items = [script.started(), *(script.step(step) for step in range(6))]
    api.send(*items[:4])
    api.send(*items[2:])
    run = api.get(f"/runs/{script.run_id}")
    assert run["steps_done"] == 6
    assert len(api.get(f"/runs/{script.run_id}/steps")["items"]) == 6


def test_events_out_of_order_within_a_batch_are_put_in_order(api: Any) -> None:
    script = RunScript()
    items = [script.started(), script.step(0), script.step(1)]
    assert api.send(items[2], items[0], items[1])["durable"][script.run_id] == 2
    assert api.get(f"/runs/{script.run_id}")["steps_done"] == 2


def test_a_step_that_comes_twice_keeps_its_first_numbers(api: Any) -> None:
    script = RunScript(layers=3)
    api.send(script.started(), script.step(0, nmse=[0.1, 0.2, 0.3]))
    api.send(script.step(0, nmse=[9.0, 9.0, 9.0]), script.step(1, nmse=[0.1, 0.1, 0.1]))
    run = api.get(f"/runs/{script.run_id}")
    assert run["steps_done"] == 2
    assert run["nmse_worst"] == 0.3
    assert api.get(f"/runs/{script.run_id}/steps")["items"][0]["nmse_worst"] == 0.3


def test_a_run_without_its_beginning_is_asked_for_it(api: Any) -> None:
    script = RunScript()
    started, late = script.started(), [script.step(0), script.step(1)]
    known = RunScript()
    response = api.post(known.started(), *late)
    assert response.status_code == 409
    problem = response.json()
    assert problem["type"] == "unknown-run"
    assert [item["value"] for item in problem["errors"]] == [script.run_id]
    assert api.get("/runs")["total"] == 0, "nothing of the batch may be stored"
    # the plugin then begins again and goes on where it was
    assert api.send(started, late[1])["durable"] == {script.run_id: 2}
    assert api.get(f"/runs/{script.run_id}")["last_step"] == 1


def test_one_bad_event_keeps_the_whole_batch_out(api: Any) -> None:
    script = RunScript(layers=3)
    data = batch_json(api.instance, script.started(), script.step(0), script.step(1))
    broken = data.replace(b'"nmse":[0.01,0.001,0.0001]', b'"nmse":[0.01,0.001]')
    assert broken != data
    problem = api.problem("POST", "/ingest", 422, content=broken)
    assert problem["errors"] == [
        {
            "field": "events.2.layers.metrics.nmse",
            "value": "has 2 items",
            "allowed": "3, as many as layers.layer",
        }
    ]
    assert api.get("/runs")["total"] == 0
    assert api.get("/instances")["items"] == []


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        (b'"step":1,', b'"step":-1,', "events.2.step"),
        (b'"kind":"step","step":1', b'"kind":"stop","step":1', "events.2"),
        (b'"model_calls":1,"duration_ms":121.5', b'"duration_ms":121.5', "events.2.model_calls"),
        (b'"model_calls":1,"duration_ms":121.5', b'"model_calls":1,"x":1,"duration_ms":121.5',
         "events.2.x"),
        (b'"nmse":[0.01,0.001,0.0001]', b'"nmse":[0.01,"much",0.0001]',
         "events.2.layers.metrics.nmse.1"),
        (b'"protocol":1', b'"protocol":2', "protocol"),
    ],
)  # fmt: skip
def test_an_error_names_the_event_and_the_field(
    api: Any, old: bytes, new: bytes, field: str
) -> None:
    script = RunScript(layers=3)
    data = batch_json(api.instance, script.started(), script.step(0), script.step(1))
    broken = data[::-1].replace(old[::-1], new[::-1], 1)[::-1]
    assert broken != data
    problem = api.problem("POST", "/ingest", 422, content=broken)
    assert problem["type"] == "validation-error"
    assert field in [item["field"] for item in problem["errors"]]
    assert all(item["allowed"] for item in problem["errors"])
    assert field in problem["detail"]


def test_a_body_that_is_no_json_is_refused(api: Any) -> None:
    problem = api.problem("POST", "/ingest", 422, content=b"{")
    assert problem["errors"][0]["field"] == "body"


def test_an_unknown_metric_is_refused_with_the_known_ones(api: Any) -> None:
    script = RunScript(layers=2)
    response = api.post(script.started(), script.step(0, sharpness=[1.0, 2.0]))
    assert response.status_code == 422
    error = response.json()["errors"][0]
    assert error["field"] == "events.1.layers.metrics.sharpness"
    assert "nmse" in error["allowed"]


def test_an_unknown_variant_and_bad_settings_are_refused(api: Any) -> None:
    script = RunScript()
    started = script.started()
    response = api.post(started.model_copy(update={"variant": "magic"}))
    assert response.status_code == 422
    error = response.json()["errors"][0]
    assert (error["field"], error["value"]) == ("events.0.variant", "magic")
    assert "taylor" in error["allowed"]
    settings = {**started.settings, "P": 99, "eps": 0}
    response = api.post(started.model_copy(update={"settings": settings}))
    assert response.status_code == 422
    errors = {item["field"]: item for item in response.json()["errors"]}
    assert errors["events.0.settings.P"]["value"] == 99
    assert errors["events.0.settings.P"]["allowed"] == "a whole number from 1 to 8"
    assert errors["events.0.settings.eps"]["allowed"] == "a number above 0 to 1"


def test_nan_and_infinities_come_back_as_what_they_were(api: Any) -> None:
    script = RunScript(layers=4)
    api.send(
        script.started(),
        script.step(0, nmse=[0.1, NAN, INF, None], cosine=[-INF, 0.5, NAN, None],
                    k_norm=[None, None, None, None]),
    )  # fmt: skip
    rows = api.get(f"/runs/{script.run_id}/layer-steps")["items"]
    assert [row["metrics"]["nmse"] for row in rows] == [0.1, "NaN", "Infinity", None]
    assert [row["metrics"]["cosine"] for row in rows] == ["-Infinity", 0.5, "NaN", None]
    assert [row["metrics"]["k_norm"] for row in rows] == [None] * 4
    step = api.get(f"/runs/{script.run_id}/steps")["items"][0]
    assert step["nmse_worst"] == "NaN"
    assert step["worst_layer"] == script.layers[1]
    assert step["nonfinite"] == 4
    assert step["nmse_median"] == "Infinity"
    run = api.get(f"/runs/{script.run_id}")
    assert run["nmse_worst"] == "NaN"
    assert run["nonfinite"] == 4
    columns = api.get(f"/runs/{script.run_id}/columns")
    assert [row[0] for row in columns["layer_steps"]["nmse"]] == [0.1, "NaN", "Infinity", None]
    # a later step without NaN does not make the run better
    api.send(script.step(1, nmse=[1.0, 1.0, 1.0, 1.0]))
    assert api.get(f"/runs/{script.run_id}")["nmse_worst"] == "NaN"


def test_nan_sorts_as_worse_than_any_number(api: Any) -> None:
    worst = {}
    for value in (0.5, NAN, None, INF):
        script = RunScript(layers=1)
        api.send(script.started(), script.step(0, nmse=[value]))
        worst[script.run_id] = value
    ids = [run["run_id"] for run in api.get("/runs", sort="-nmse_worst")["items"]]
    values = [worst[run_id] for run_id in ids]
    assert math.isnan(values[0]) and values[1:] == [INF, 0.5, None]
    ids = [run["run_id"] for run in api.get("/runs", sort="nmse_worst")["items"]]
    values = [worst[run_id] for run_id in ids]
    assert values[:2] == [0.5, INF] and math.isnan(values[2]) and values[3] is None


def test_events_lost_add_up(api: Any) -> None:
    script = RunScript()
    api.send(script.started(), script.lost(3), script.step(0), script.lost(4))
    assert api.get(f"/runs/{script.run_id}")["events_lost"] == 7


def test_a_final_image_after_the_end_is_taken(api: Any) -> None:
    script = RunScript()
    api.send(script.started(), script.step(0), script.ended("interrupted"))
    api.send(script.image("final", None))
    run = api.get(f"/runs/{script.run_id}")
    assert run["status"] == "interrupted"
    assert run["final"]
    shown = api.client.get(f"/api/v1/images/{run['final']}")
    assert shown.content == png()
    assert shown.headers["content-type"] == "image/png"
    assert "immutable" in shown.headers["cache-control"]
    items = api.get(f"/runs/{script.run_id}/images")["items"]
    assert [item["kind"] for item in items] == ["final"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"media_type": "image/jpeg"}, "events.1.data"),
        ({"width": 9000}, "events.1.width"),
        ({"height": 0}, "events.1.height"),
        ({"data": b"AAAA"}, "events.1.data"),
    ],
)
def test_an_image_that_is_not_what_it_says_is_refused(
    api: Any, fields: dict[str, Any], field: str
) -> None:
    script = RunScript()
    response = api.post(script.started(), script.image(**fields))
    assert response.status_code == 422
    assert [item["field"] for item in response.json()["errors"]] == [field]
    assert not list(api.services.images.folder.rglob("*.*"))


def test_an_image_over_the_limit_is_refused(make_api: Any) -> None:
    import base64

    api = make_api(max_image=1024)
    script = RunScript()
    large = base64.b64encode(png() + bytes(2000))
    response = api.post(script.started(), script.image(data=large))
    assert response.status_code == 422
    assert response.json()["errors"][0]["allowed"] == "at most 1024 bytes"


def test_a_packed_body_is_unpacked(api: Any) -> None:
    script = RunScript()
    data = gzip.compress(batch_json(api.instance, *script.whole()))
    response = api.client.post(
        "/api/v1/ingest", content=data, headers={"content-encoding": "gzip"}
    )
    assert response.status_code == 200
    assert api.get(f"/runs/{script.run_id}")["steps_done"] == 4


def test_broken_packing_is_refused(api: Any) -> None:
    data = gzip.compress(batch_json(api.instance, RunScript().started()))
    headers = {"content-encoding": "gzip"}
    assert api.problem("POST", "/ingest", 400, content=data[:40], headers=headers)
    assert api.problem("POST", "/ingest", 400, content=b"no gzip", headers=headers)
    headers = {"content-encoding": "br"}
    assert api.problem("POST", "/ingest", 415, content=data, headers=headers)


def test_a_body_or_its_content_over_the_limit_is_refused(make_api: Any) -> None:
    api = make_api(max_body=4096, max_unpacked=8192)
    assert api.problem("POST", "/ingest", 413, content=bytes(4097))
    bomb = gzip.compress(bytes(1_000_000))
    assert len(bomb) < 4096
    headers = {"content-encoding": "gzip"}
    problem = api.problem("POST", "/ingest", 413, content=bomb, headers=headers)
    assert problem["type"] == "too-large"
    assert "8192" in problem["detail"]


def test_an_empty_batch_tells_of_an_instance(api: Any) -> None:
    api.send()
    item = api.get(f"/instances/{api.instance.instance_id}")
    assert item["name"] == "test:8188"
    assert item["online"] is False
    other = instance(api.instance.instance_id, name="renamed:1")
    api.send(instance=other)
    assert api.get(f"/instances/{api.instance.instance_id}")["name"] == "renamed:1"
