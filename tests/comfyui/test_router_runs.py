"""The error-budget router in the real ComfyUI: it calibrates, then routes, and says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flux import LAYERS, sample

pytestmark = pytest.mark.comfyui

SIDE = 64
"""Latent pixels, 32×32 tokens: 4×4 tiles, of which a window of radius 1 has nine."""

TILED = {"min_tokens": 0, "dense_first_steps": 0}
ROUTER: dict[str, Any] = {
    "min_runs": 2, "budget_layer": 0.05, "budget_step": 10.0, "cost": "flops", "table": "t",
    "quality_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def output(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ComfyUI's output folder, and none of the tables of other tests."""
    import folder_paths

    from attnscope.comfy_plugin import router_tables

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(router_tables, "_files", {})
    yield tmp_path / "output"


def routed(prepared: Any, flux: Any, **settings: Any) -> Any:
    """Taylor → Tiled → Router on the small Flux."""
    model = prepared("taylor", model=flux, P=3)
    model = prepared("tiled", model=model, **TILED)
    return prepared("router", model=model, **{**ROUTER, **settings})


def test_nodes_before_it_are_measured_then_chosen(
    flux: Any, prepared: Any, receiver: Any, output: Path
) -> None:
    model = routed(prepared, flux)
    exact = sample(flux, side=SIDE)
    for run in (1, 2):
        # While it measures, the picture is the exact one.
        assert torch.equal(sample(model, side=SIDE), exact)
        receiver.finished(run)
    started = receiver.run()[0]
    assert started.settings["candidates"] == "taylor; tiled:min_tokens=0,dense_first_steps=0"
    for step in receiver.steps():
        assert step.layers.path == ["exact"] * len(LAYERS)
        assert {reason.reason for reason in step.reasons} == {"router_unmeasured"}
        assert "tiled measured in 1 of 2 runs" in step.reasons[0].detail
    picture = sample(model, side=SIDE, seed=8)
    receiver.finished(3)
    exact = sample(flux, side=SIDE, seed=8)
    assert not torch.equal(picture, exact)
    assert (picture - exact).norm() < 0.1 * exact.norm()
    paths = [path for step in receiver.steps() for path in step.layers.path]
    assert paths.count("tiled") > len(paths) / 2
    for step in receiver.steps():
        why = {reason.layer: reason for reason in step.reasons}
        for index, layer in enumerate(step.layers.layer):
            if step.layers.path[index] == "exact":
                assert why[layer].kind == "gate"
                continue
            assert why[layer].kind == "choice"
            assert "(chosen)" in why[layer].detail
            predicted = step.layers.metrics["predicted_nmse"][index]
            assert 0 < predicted <= 0.05
            assert step.layers.metrics["budget_share"][index] == pytest.approx(predicted / 0.05)
            assert step.layers.metrics["nmse"][index] < 0.05
    file = json.loads((output / "attnscope" / "router" / "t.json").read_text())
    assert file["runs"] >= 2
    assert {text.split(":")[0] for text in file["candidates"].values()} == {"taylor", "tiled"}


def test_quality_speed_0_is_exact_and_measures_nothing(
    flux: Any, prepared: Any, receiver: Any, output: Path
) -> None:
    model = routed(prepared, flux, quality_speed=0.0)
    assert torch.equal(sample(model, side=SIDE), sample(flux, side=SIDE))
    receiver.finished()
    for step in receiver.steps():
        assert {reason.reason for reason in step.reasons} == {"disabled"}
    assert not (output / "attnscope").exists()


def test_without_nodes_before_it_tiled_and_taylor_are_candidates_behind_their_gates(
    flux: Any, prepared: Any, receiver: Any
) -> None:
    sample(prepared("router", **ROUTER), side=SIDE)
    receiver.finished()
    assert receiver.run()[0].settings["candidates"] == "tiled; taylor"
    detail = receiver.steps()[-1].reasons[0].detail
    assert "tiled: below_min_tokens" in detail
    assert "taylor measured in 0 of 2 runs" in detail


def test_hybrid_gets_what_it_needs_and_the_patch_is_gone_afterwards(
    flux: Any, prepared: Any, receiver: Any
) -> None:
    import comfy.ldm.flux.math as flux_math

    before = flux_math.attention
    model = prepared("hybrid", model=flux, local_window=8, min_tokens=0)
    model = prepared("router", model=model, **ROUTER)
    for run in (1, 2, 3):
        sample(model, side=16)
        receiver.finished(run)
        assert flux_math.attention is before
    told = [reason for step in receiver.steps() for reason in step.reasons]
    assert all("hybrid up to" in reason.detail for reason in told)


def test_what_is_frozen_chooses_alike(flux: Any, prepared: Any, receiver: Any) -> None:
    for run in (1, 2):
        sample(routed(prepared, flux), side=SIDE)
        receiver.finished(run)
    frozen = routed(prepared, flux, learn=False)
    pictures, details = [], []
    for run in (3, 4):
        pictures.append(sample(frozen, side=SIDE, seed=9))
        receiver.finished(run)
        details.append([reason.detail for step in receiver.steps() for reason in step.reasons])
    assert torch.equal(*pictures)
    assert details[0] == details[1]


def test_a_run_that_breaks_off_leaves_nothing(
    flux: Any, prepared: Any, receiver: Any, output: Path
) -> None:
    from flux import acting

    def fail() -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sample(acting(routed(prepared, flux), {2: fail}), side=SIDE)
    receiver.finished()
    assert not (output / "attnscope").exists()


def test_a_table_that_cannot_be_read_is_left_alone(
    flux: Any, prepared: Any, receiver: Any, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = output / "attnscope" / "router" / "t.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"format": "something else"}')
    exact = sample(flux, side=SIDE)
    for run in (1, 2, 3):
        assert torch.equal(sample(routed(prepared, flux), side=SIDE), exact) == (run < 3)
        receiver.finished(run)
    assert "format: is 'something else'" in caplog.text
    assert file.read_text() == '{"format": "something else"}'


def test_it_measures_without_a_server_too(
    flux: Any, prepared: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNSCOPE_DISABLE", "1")
    model = routed(prepared, flux, cost="time")
    sample(model, side=SIDE, steps=2)
    file = json.loads((output / "attnscope" / "router" / "t.json").read_text())
    assert {item["what"].split("-")[0] for item in file["times"]} == {"exact", "taylor", "tiled"}
    assert len(file["errors"]) > 0


def test_tables_of_models_do_not_share_a_file(comfyui: Any) -> None:
    from attnscope.attention.settings import RouterSettings
    from attnscope.comfy_plugin.router_tables import table_for

    models = ("a.gguf", "a.safetensors", "a b", "a_b", "..", "")
    paths = [table_for(RouterSettings(), model).path for model in models]
    assert len(set(paths)) == len(models)
    assert {path.parent.name for path in paths} == {"router"}
    named = [table_for(RouterSettings(table="mine"), model) for model in ("a", "a", "b")]
    assert named[0] is named[1] is not named[2]
