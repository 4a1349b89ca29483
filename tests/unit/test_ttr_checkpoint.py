"""Checkpoints: what is written is read; what is damaged or foreign is refused by its path."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attnscope.attention.ttr import checkpoint
from attnscope.attention.ttr.checkpoint import (
    AverageInfo,
    CheckpointError,
    CheckpointInfo,
    LayerInfo,
    LayerTensors,
)
from attnscope.attention.ttr.checkpoint_path import checkpoint_path
from attnscope.attention.ttr.student import StudentOptions
from attnscope.attention.variant import ModelPrint

OPTIONS = StudentOptions("residual", 0, 0, 16, 1, 0)
MODEL = ModelPrint("flux1-dev.safetensors", "abc")


def info(**fields: Any) -> CheckpointInfo:
    layer = LayerInfo(
        heads=2, head_dim=8, updates=3, loss=AverageInfo(total=1.0, weight=0.5),
        nmse=AverageInfo(), ready=False,
    )  # fmt: skip
    values: dict[str, Any] = {
        "student": "residual", "features": 16, "window_radius": 1, "landmarks": 0,
        "model": MODEL.name, "weights": MODEL.weights, "layers": {"single.0": layer},
    }  # fmt: skip
    return CheckpointInfo(**{**values, **fields})


def tensors(value: float = 1.0) -> dict[str, LayerTensors]:
    student = {"weight": torch.full((2, 3), value), "share": torch.zeros(2)}
    return {"single.0": LayerTensors(student, {"weight/exp_avg": torch.ones(2, 3)})}


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    checkpoint.write(path, info(), tensors())
    read, found = checkpoint.read(path)
    assert read == info()
    assert torch.equal(found["single.0"].student["weight"], torch.ones(2, 3))
    assert torch.equal(found["single.0"].optimizer["weight/exp_avg"], torch.ones(2, 3))
    assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    student = {"a": shared, "b": shared.view(2, 3).T}
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, info(), {"single.0": LayerTensors(student)})
    found = checkpoint.read(path)[1]["single.0"].student
    assert torch.equal(found["b"], shared.view(2, 3).T)


@pytest.mark.parametrize("where", ["save", "sync", "replace"])
def test_a_full_disk_leaves_the_earlier_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, info(), tensors(1.0))
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> Any:
        if where == "save":
            # Some of it is written before the disk is full.
            Path(args[1]).write_bytes(before[:40])
        raise OSError(28, "No space left on device")

    target = {"save": (checkpoint, "save_file"), "sync": (os, "fsync"), "replace": (os, "replace")}
    with monkeypatch.context() as patch:
        patch.setattr(*target[where], fail)
        with pytest.raises(CheckpointError, match="No space left") as problem:
            checkpoint.write(path, info(), tensors(2.0))
    assert str(path) in str(problem.value)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
    checkpoint.write(path, info(), tensors(2.0))
    assert checkpoint.read(path)[1]["single.0"].student["weight"][0, 0] == 2.0


@pytest.mark.parametrize("kept", [0, 4, 100, -20])
def test_a_truncated_one_is_refused_by_its_path(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, info(), tensors())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as problem:
        checkpoint.read(path)
    assert str(problem.value).startswith(f"{path}: ")


def test_a_missing_one_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        checkpoint.read(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "attnscope-capture"}, "is no checkpoint of Flux2TTR"),
        ({"format": ""}, "is no checkpoint of Flux2TTR"),
        ({"version": "2"}, "version is '2'; allowed: '1'"),
        ({"info": "{}"}, "student in the metadata"),
        ({"info": "not json"}, "in the metadata"),
    ],
)
def test_a_foreign_one_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, str], complaint: str
) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"format": "attnscope-flux2ttr", "version": "1", "info": info().model_dump_json()}
    save_file({"single.0|student|weight": torch.ones(1)}, path, {**metadata, **changes})
    with pytest.raises(CheckpointError, match=complaint) as problem:
        checkpoint.read(path)
    assert str(path) in str(problem.value)


def test_tensors_that_nobody_named_and_those_that_are_not_finite_are_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"format": "attnscope-flux2ttr", "version": "1", "info": info().model_dump_json()}
    save_file({"single.9|student|weight": torch.ones(1)}, path, metadata)
    with pytest.raises(CheckpointError, match=r"single\.9"):
        checkpoint.read(path)
    save_file({"single.0|student|weight": torch.tensor([torch.nan])}, path, metadata)
    with pytest.raises(CheckpointError, match="NaN"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("field", "value"), [("student", "kernel"), ("features", 32), ("window_radius", 2)]
)
def test_students_of_other_settings_are_refused(tmp_path: Path, field: str, value: object) -> None:
    other = info(**{field: value})
    with pytest.raises(CheckpointError, match=f"its {field} is {value!r}; allowed: "):
        checkpoint.check_fit(tmp_path / "a", other, OPTIONS, "abc", named=True)
    checkpoint.check_fit(tmp_path / "a", info(), OPTIONS, "abc", named=True)


def test_another_models_students_are_taken_only_by_name(tmp_path: Path) -> None:
    checkpoint.check_fit(tmp_path / "a", info(), OPTIONS, "other", named=True)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.check_fit(tmp_path / "a", info(), OPTIONS, "other", named=False)


def test_metadata_is_json_that_other_programs_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, info(), tensors())
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["info"])["layers"]["single.0"]["updates"] == 3


def test_paths(tmp_path: Path) -> None:
    def path(named: str, options: StudentOptions = OPTIONS, model: ModelPrint = MODEL) -> Path:
        found = checkpoint_path(named, tmp_path, model, options)
        assert found is not None
        return found

    assert path("mine") == tmp_path / "mine.safetensors"
    assert path("sub/mine.safetensors") == tmp_path / "sub" / "mine.safetensors"
    assert path(" /elsewhere/v1.2 ") == Path("/elsewhere/v1.2.safetensors")
    ours = path("")
    assert ours.parent == tmp_path and ours.name.startswith("flux1-dev-residual-")
    assert path("") == ours
    others = {
        path("", StudentOptions("residual", 0, 0, 32, 1, 0)),
        path("", StudentOptions("kernel", 0, 0, 16, 1, 0)),
        path("", model=ModelPrint(MODEL.name, "def")),
        path("", model=ModelPrint("../../strange name!.gguf", "abc")),
    }
    assert len(others | {ours}) == 5
    assert all(other.parent == tmp_path for other in others)
    assert checkpoint_path("", None, MODEL, OPTIONS) is None
    assert checkpoint_path("relative", None, MODEL, OPTIONS) is None
    assert checkpoint_path("/a/b", None, MODEL, OPTIONS) == Path("/a/b.safetensors")
