"""Export and import: a round trip yields equal rows, a bad line changes nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.answers import strip_ids
from support.events import INF, NAN, RunScript

from attnscope.backend import cli, exporting, importing
from attnscope.backend.config import Config
from attnscope.wire import ReasonCount

PATHS = ("", "/steps", "/layer-steps", "/fallbacks", "/revisions", "/images")


def everything(api: Any) -> dict[str, Any]:
    """All that an application says of its runs."""
    answer: dict[str, Any] = {}
    for run in api.get("/runs", sort="started_at")["items"]:
        for path in PATHS:
            answer[run["run_id"] + path] = strip_ids(api.get(f"/runs/{run['run_id']}{path}"))
    return answer


def fill(api: Any) -> RunScript:
    """Several runs with everything that a run can have."""
    script = RunScript(layers=5, steps=4, label="Ünïcode", at=1000.0)
    api.send(script.started(), script.step(0, nmse=[NAN, INF, -INF, None, 1e-9]))
    pushed = api.client.put(
        f"/api/v1/runs/{script.run_id}/settings", json={"base_revision": 0, "settings": {"P": 4}}
    ).json()
    api.send(script.report(pushed["id"], "delivered"), script.report(pushed["id"], "applied", 1))
    api.send(script.image("preview", 0), script.step(1, revision=1), script.lost(3))
    api.send(script.step(1), script.step(3), script.ended("failed", "out of memory"))
    api.send(script.image("final", None))
    api.send(*RunScript(layers=2, steps=2, variant="exact", at=2000.0).whole())
    unfinished = RunScript(layers=2, steps=2, at=3000.0)
    api.send(unfinished.started(), unfinished.step(0))
    return script


@pytest.mark.parametrize("name", ["runs.jsonl", "runs.jsonl.gz"])
def test_a_round_trip_yields_equal_rows(make_api: Any, tmp_path: Path, name: str) -> None:
    source, target = make_api("source"), make_api("target")
    fill(source)
    file = tmp_path / name
    assert exporting.export_file(source.services.config, file) == 3
    assert file.read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")
    report = importing.import_file(target.services.config, file)
    assert (report.runs, report.known) == (3, 0)
    assert everything(target) == everything(source)
    for sha256 in {i["sha256"] for run in target.get("/runs")["items"]
                   for i in target.get(f"/runs/{run['run_id']}/images")["items"]}:  # fmt: skip
        assert target.client.get(f"/api/v1/images/{sha256}").status_code == 200
    # and once more changes nothing
    before, latest = everything(target), target.get("/health")["latest_seq"]
    assert importing.import_file(target.services.config, file).stored == 0
    assert everything(target) == before
    assert target.get("/health")["latest_seq"] == latest


def test_a_later_export_adds_what_is_new(make_api: Any, tmp_path: Path) -> None:
    source, target = make_api("source"), make_api("target")
    script = RunScript(steps=4, at=1000.0)
    source.send(script.started(), script.step(0), script.lost(2))
    exporting.export_file(source.services.config, tmp_path / "early")
    importing.import_file(target.services.config, tmp_path / "early")
    source.send(script.step(1), script.lost(2), script.step(2), script.ended())
    exporting.export_file(source.services.config, tmp_path / "late")
    importing.import_file(target.services.config, tmp_path / "late")
    assert everything(target) == everything(source)


def test_chosen_runs_without_images(make_api: Any, tmp_path: Path) -> None:
    source = make_api("source")
    script = fill(source)
    file = tmp_path / "one.jsonl"
    exporting.export_file(source.services.config, file, [script.run_id], with_images=False)
    kinds = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in kinds][:3] == ["attnscope-runs", "instance", "event"]
    assert not [k for k in kinds if k["kind"] == "event" and k["event"]["kind"] == "image"]
    with pytest.raises(exporting.ExportError, match="there is no run 'nosuch'"):
        exporting.export_file(source.services.config, file, ["nosuch"])
    assert file.exists(), "a failed export leaves the older file alone"


def test_a_deleted_run_comes_back_by_import(make_api: Any, tmp_path: Path) -> None:
    api = make_api("source")
    script = RunScript(at=1000.0)
    api.send(*script.whole())
    before = everything(api)
    exporting.export_file(api.services.config, tmp_path / "runs")
    assert api.client.delete(f"/api/v1/runs/{script.run_id}").status_code == 204
    assert everything(api) == {}
    importing.import_file(api.services.config, tmp_path / "runs")
    assert everything(api) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:4], "{", *lines[4:]], "line 5: "),
        (lambda lines: lines[:-1], "cut off"),
        (lambda lines: lines[1:], "line 1: the first line"),
        (lambda lines: [lines[0].replace('"version":1', '"version":2'), *lines[1:]], "newer"),
        (lambda lines: [lines[0], *lines[2:]], "line 2: an event before any instance"),
        (
            lambda lines: [line.replace('"step":1,', '"step":-1,') for line in lines],
            "event.step: -1",
        ),
        (
            lambda lines: [line.replace('"q_norm"', '"sharpness"') for line in lines],
            "event.layers.metrics.sharpness",
        ),
    ],
)
def test_a_bad_line_is_named_and_changes_nothing(
    make_api: Any, tmp_path: Path, change: Any, message: str
) -> None:
    source, target = make_api("source"), make_api("target")
    source.send(*RunScript(layers=2, at=1000.0).whole())
    file = tmp_path / "runs"
    exporting.export_file(source.services.config, file)
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    with pytest.raises(importing.ImportFailed, match=message):
        importing.import_file(target.services.config, file)
    assert everything(target) == {}


def test_a_broken_packed_file_is_named(make_api: Any, tmp_path: Path) -> None:
    source, target = make_api("source"), make_api("target")
    source.send(*RunScript(at=1000.0).whole())
    file = tmp_path / "runs.gz"
    exporting.export_file(source.services.config, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(importing.ImportFailed, match="packed file is broken"):
        importing.import_file(target.services.config, file)
    assert everything(target) == {}


def test_the_commands(make_api: Any, tmp_path: Path, capsys: Any) -> None:
    source, target = make_api("source"), make_api("target")
    fill(source)
    file = tmp_path / "runs.jsonl.gz"
    data = str(source.services.config.data_dir)
    assert cli.main(["export", str(file), "--data-dir", data]) == 0
    assert len(gzip.decompress(file.read_bytes()).splitlines()) > 10
    data = str(target.services.config.data_dir)
    assert cli.main(["import", str(file), "--data-dir", data]) == 0
    assert "imported 3 runs" in capsys.readouterr().err
    assert everything(target) == everything(source)
    assert cli.main(["import", str(tmp_path / "none"), "--data-dir", data]) == 1
    assert cli.main(["export", str(file), "--data-dir", str(tmp_path / "none")]) == 1
    assert "there is no database" in capsys.readouterr().err


def test_an_import_into_a_new_folder_makes_it(make_api: Any, tmp_path: Path) -> None:
    source = make_api("source")
    fill(source)
    exporting.export_file(source.services.config, tmp_path / "runs")
    config = Config(data_dir=tmp_path / "new" / "folder")
    assert importing.import_file(config, tmp_path / "runs").runs == 3


def test_choices_are_told_with_their_detail_and_survive_a_round_trip(
    make_api: Any, tmp_path: Path
) -> None:
    source, target = make_api("source"), make_api("target")
    script = RunScript(2, 1, "router")
    started, closed = script.started(), script.step(0, reasons=False)
    why = ReasonCount(
        layer="single.0",
        kind="choice",
        reason="router_cheapest",
        count=1,
        detail="tiled up to 0.1",
    )
    source.send(started, closed.model_copy(update={"reasons": [why]}), script.ended())
    (row,) = source.get(f"/runs/{script.run_id}/fallbacks")["items"]
    assert (row["kind"], row["reason"], row["detail"]) == (
        "choice", "router_cheapest", "tiled up to 0.1",
    )  # fmt: skip
    file = tmp_path / "runs.jsonl"
    exporting.export_file(source.services.config, file)
    importing.import_file(target.services.config, file)
    assert everything(target) == everything(source)
