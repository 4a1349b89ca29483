"""Listing, renaming, deleting, and losing runs."""

from __future__ import annotations

from typing import Any

import pytest
from support.events import INF, NAN, RunScript, instance

from attnscope.attention.sums_paths import SumsPath
from attnscope.backend import clock, columns, sweeper
from attnscope.db import runs, steps


def test_the_list_is_filtered_sorted_and_paged(api: Any) -> None:
    scripts = [
        RunScript(layers=1, steps=2, at=1000.0 + n, label=f"sweep 100% {n}") for n in range(5)
    ]
    for script in scripts[:4]:
        api.send(*script.whole())
    api.send(scripts[4].started())
    exact = RunScript(layers=1, variant="exact", at=2000.0)
    api.send(exact.started(), exact.ended("failed", "boom"), instance=instance())

    everything = api.get("/runs")
    assert everything["total"] == 6
    assert everything["items"][0]["run_id"] == scripts[4].run_id, "running runs stand first"
    assert everything["items"][1]["run_id"] == exact.run_id, "then the newest"

    def ids(**params: Any) -> list[str]:
        return [run["run_id"] for run in api.get("/runs", **params)["items"]]

    assert ids(variant="exact") == [exact.run_id]
    assert ids(status="failed") == [exact.run_id]
    assert len(ids(status=["failed", "completed"])) == 5
    assert len(ids(instance_id=api.instance.instance_id)) == 5
    assert ids(q="SWEEP 100% 3") == [scripts[3].run_id]
    assert ids(q="sweep _") == []
    assert ids(q=exact.run_id[:8]) == [exact.run_id]
    assert ids(sort="started_at") == [s.run_id for s in (*scripts, exact)]
    assert ids(sort="-started_at", limit=2, offset=1) == [scripts[4].run_id, scripts[3].run_id]
    page = api.get("/runs", limit=2, offset=4)
    assert (page["total"], len(page["items"])) == (6, 2)


@pytest.mark.parametrize(
    ("params", "field"),
    [({"limit": 501}, "limit"), ({"offset": -1}, "offset"), ({"sort": "colour"}, "sort"),
     ({"status": "asleep"}, "status.0")],
)  # fmt: skip
def test_queries_that_are_not_allowed_are_named(
    api: Any, params: dict[str, Any], field: str
) -> None:
    problem = api.problem("GET", "/runs", 422, params=params)
    assert [item["field"] for item in problem["errors"]] == [field]


def test_what_does_not_exist_is_not_found(api: Any) -> None:
    nobody = "0" * 32
    for path in ("", "/steps", "/columns", "/revisions", "/images", "/figures/quality"):
        assert api.problem("GET", f"/runs/{nobody}{path}", 404)["type"] == "not-found"
    assert api.problem("GET", f"/instances/{nobody}", 404)
    assert api.problem("GET", f"/images/{'0' * 64}", 404)
    assert api.problem("GET", "/nowhere", 404)
    assert api.problem("GET", "/runs/not-an-id", 422)
    assert api.problem("POST", "/runs", 405)
    script = RunScript(layers=1)
    api.send(script.started())
    assert api.problem("GET", f"/runs/{script.run_id}/layer-steps", 404, params={"layer": "x.1"})


def test_a_run_is_renamed(api: Any) -> None:
    script = RunScript()
    api.send(script.started())
    path = f"/api/v1/runs/{script.run_id}"
    assert api.client.patch(path, json={"label": "better"}).json()["label"] == "better"
    assert api.get(f"/runs/{script.run_id}")["label"] == "better"
    assert api.problem("PATCH", f"/runs/{script.run_id}", 422, json={"label": "x" * 201})


def test_a_deleted_run_is_gone_with_its_images(api: Any) -> None:
    script, other = RunScript(layers=2, steps=2), RunScript(layers=2, steps=2)
    api.send(*script.whole())
    api.send(other.started(), other.image("preview", 0))
    own = script.image("preview", 99)
    api.send(own)
    path = f"/runs/{script.run_id}"
    hashes = {image["sha256"] for image in api.get(path + "/images")["items"]}
    assert all(api.services.images.path(sha256).exists() for sha256 in hashes)
    assert api.client.delete("/api/v1" + path).status_code == 204
    assert api.problem("GET", path, 404)
    kept = [sha256 for sha256 in hashes if api.services.images.path(sha256).exists()]
    assert kept == [image["sha256"] for image in api.get(f"/runs/{other.run_id}/images")["items"]]
    changes = api.get("/changes", run_id=script.run_id)["items"]
    assert [item["kind"] for item in changes] == ["run_deleted"]
    # a straggler neither brings it back nor makes the plugin send it anew
    late = script.image("final", None)
    assert api.send(late) == {"durable": {script.run_id: late.seq}}
    assert api.problem("GET", path, 404)


def test_a_running_run_is_not_deleted(api: Any) -> None:
    script = RunScript()
    api.send(script.started())
    problem = api.problem("DELETE", f"/runs/{script.run_id}", 409)
    assert problem["type"] == "run-running"


def test_a_silent_run_is_lost_and_found(api: Any, monkeypatch: Any) -> None:
    script, heard = RunScript(layers=1), RunScript(layers=1)
    api.send(script.started(), script.step(0))
    assert sweeper.sweep(api.services) == []
    real = clock.now()
    later = real + api.services.config.lost_after + 1
    for module in ("ingest", "run_writer", "sweeper", "mailbox"):
        monkeypatch.setattr(f"attnscope.backend.{module}.now", lambda: later)
    api.send(heard.started(), instance=instance())
    assert sweeper.sweep(api.services) == [script.run_id]
    assert api.get(f"/runs/{script.run_id}")["status"] == "lost"
    assert api.get(f"/runs/{heard.run_id}")["status"] == "running"
    assert api.get(f"/instances/{api.instance.instance_id}")["running"] == []
    body = {"base_revision": 0, "settings": {"P": 5}}
    path = f"/runs/{script.run_id}/settings"
    assert api.problem("PUT", path, 409, json=body)["type"] == "run-ended"
    api.send(script.step(1))
    assert api.get(f"/runs/{script.run_id}")["status"] == "running"
    assert api.get(f"/instances/{api.instance.instance_id}")["running"] == [script.run_id]


def test_a_connected_mailbox_keeps_a_run_from_being_lost(api: Any, monkeypatch: Any) -> None:
    script = RunScript(layers=1)
    api.send(script.started())
    api.services.mailboxes.connect(api.instance.instance_id)
    monkeypatch.setattr("attnscope.backend.sweeper.now", lambda: clock.now() + 1e6)
    assert sweeper.sweep(api.services) == []
    api.services.mailboxes.disconnect(api.instance.instance_id)
    assert sweeper.sweep(api.services) == [script.run_id]


def test_a_lost_run_may_end_after_all(api: Any, monkeypatch: Any) -> None:
    script = RunScript(layers=1)
    api.send(script.started())
    monkeypatch.setattr("attnscope.backend.sweeper.now", lambda: clock.now() + 1e6)
    sweeper.sweep(api.services)
    api.send(script.ended("completed"))
    assert api.get(f"/runs/{script.run_id}")["status"] == "completed"


def test_columns_hold_the_whole_run(api: Any) -> None:
    script = RunScript(layers=3, steps=5)
    api.send(script.started(), script.step(0), script.step(2), script.step(4))
    answer = api.get(f"/runs/{script.run_id}/columns")
    assert answer["layers"] == script.layers
    assert answer["steps"]["step"] == [0, 2, 4]
    assert len(answer["layer_steps"]["nmse"]) == 3
    assert answer["layer_steps"]["q_norm"][2] == [0.25, 2.25, 4.25]
    assert answer["paths"] == [["taylor"] * 3] * 3
    assert answer["reasons"] == {"fallback.denominator": [3, 3, 3]}
    assert answer["seq"] == api.get("/health")["latest_seq"]


def test_what_computed_the_sums_is_kept_per_layer_and_step(api: Any) -> None:
    script = RunScript(layers=3, steps=2)
    codes = [float(SumsPath.TORCH_NO_CUDA), None, float(SumsPath.STREAMING_TERMS)]
    api.send(script.started(), script.step(0, sums_path=codes))
    rows = api.get(f"/runs/{script.run_id}/layer-steps")["items"]
    assert [row["metrics"]["sums_path"] for row in rows] == codes
    columns = api.get(f"/runs/{script.run_id}/columns")
    assert [row[0] for row in columns["layer_steps"]["sums_path"]] == codes


def test_layers_that_were_not_announced_are_kept(api: Any) -> None:
    script = RunScript(layers=2)
    started = script.started()
    started.model.layers.clear()
    api.send(started, script.step(0))
    assert api.get(f"/runs/{script.run_id}")["layers"] == script.layers
    script.layers = [*script.layers, "single.9"]
    api.send(script.step(1))
    assert api.get(f"/runs/{script.run_id}")["layers"] == script.layers
    answer = api.get(f"/runs/{script.run_id}/columns")
    assert answer["layer_steps"]["nmse"][2][0] is None


def test_dense_and_sparse_runs_give_the_same_columns(api: Any) -> None:
    """A run with every layer in every step takes a faster way to the same matrices."""
    script = RunScript(layers=3, steps=3)
    strange = {"nmse": [NAN, INF, None], "cosine": [0.5, NAN, -INF]}
    api.send(script.started(), script.step(0), script.step(1, **strange), script.step(2))
    with api.services.store.read() as session:
        run = runs.find(session, script.run_id)
        assert run is not None
        rows = steps.layer_rows(session, run.id)
    assert columns._is_dense(rows, 3, 3)
    place = {0: 0, 1: 1, 2: 2}
    dense, sparse = columns._dense(rows, 3, place), columns._sparse(rows, 3, place)
    assert repr(dense) == repr(sparse)
    assert repr(dense[0]["nmse"][0]).startswith("[0.1, nan,")
    assert not columns._is_dense(rows[:-1], 3, 3)
    assert not columns._is_dense([*rows[:-2], rows[-1], rows[-2]], 3, 3)
