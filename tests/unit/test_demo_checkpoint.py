"""The demo checkpoint: what is written reads back, and nothing else is taken."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from attnscope.comfy_plugin.demo.captions import VOCABULARY
from attnscope.comfy_plugin.demo.checkpoint import (
    DEFAULT_PATH,
    UNET_CONFIG,
    CheckpointError,
    load_checkpoint,
    norm_names_to,
    save_checkpoint,
)
from attnscope.comfy_plugin.demo.codec import LinearCodec

CONFIG = {"unet": UNET_CONFIG, "shift": 3.0}


@pytest.fixture
def codec() -> LinearCodec:
    return LinearCodec(torch.rand(192), torch.rand(192, 16), torch.rand(16, 192))


def test_round_trip(tmp_path: Path, codec: LinearCodec) -> None:
    weights = {"a.weight": torch.randn(3, 4), "x.key_norm.scale": torch.ones(5)}
    save_checkpoint(tmp_path / "demo.safetensors", weights, codec, CONFIG)
    loaded = load_checkpoint(tmp_path / "demo.safetensors")
    assert loaded.config == CONFIG
    assert loaded.weights.keys() == weights.keys()
    assert loaded.weights["a.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(
        loaded.weights["a.weight"].float(), weights["a.weight"], rtol=0.01, atol=0
    )
    assert torch.equal(loaded.codec.to_latent, codec.to_latent)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.safetensors"]


def test_norm_names_follow_the_model() -> None:
    old = {"b.key_norm.scale": torch.ones(2), "b.qkv.weight": torch.ones(2)}
    new = norm_names_to(old, {"b.key_norm.weight", "b.qkv.weight"})
    assert set(new) == {"b.key_norm.weight", "b.qkv.weight"}
    assert set(norm_names_to(new, set(old))) == set(old)


def _refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    _refused(tmp_path / "gone.safetensors", "No demo checkpoint")


def test_folder(tmp_path: Path) -> None:
    _refused(tmp_path, "No demo checkpoint")


def test_other_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"w": torch.ones(2)}, str(path))
    _refused(path, "not an AttnScope demo checkpoint")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\xff" * 64])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(content)
    _refused(path, "not a readable safetensors file")


class _Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("the checkpoint was unpickled",))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "demo.safetensors"
    path.write_bytes(pickle.dumps(_Bomb()))
    _refused(path, "not a readable safetensors file")
    torch.save({"bomb": _Bomb()}, path)
    _refused(path, "not a readable safetensors file")


def test_truncated(tmp_path: Path, codec: LinearCodec) -> None:
    path = tmp_path / "demo.safetensors"
    save_checkpoint(path, {"a": torch.randn(64, 64)}, codec, CONFIG)
    path.write_bytes(path.read_bytes()[:-100])
    _refused(path, "not a readable safetensors file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": "99"}, "format 99"),
        ({"config": "{"}, "damaged"),
        ({"config": "[]"}, "damaged"),
        ({"config": json.dumps({"unet": 3})}, "damaged"),
        ({"vocabulary": json.dumps(["red"])}, "another vocabulary"),
    ],
)
def test_changed_metadata(
    tmp_path: Path, codec: LinearCodec, change: dict[str, str], match: str
) -> None:
    path = tmp_path / "demo.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, codec, CONFIG)
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors, str(path), metadata={**metadata, **change})
    _refused(path, match)


def test_missing_codec(tmp_path: Path, codec: LinearCodec) -> None:
    path = tmp_path / "demo.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, codec, CONFIG)
    with safe_open(str(path), framework="pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys() if not n.startswith("codec.")}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors, str(path), metadata=metadata)
    _refused(path, "damaged")


def test_committed_checkpoint() -> None:
    assert DEFAULT_PATH.stat().st_size <= 20_000_000
    checkpoint = load_checkpoint(DEFAULT_PATH)
    assert checkpoint.config["unet"] == UNET_CONFIG
    assert all(weight.isfinite().all() for weight in checkpoint.weights.values())
    with safe_open(str(DEFAULT_PATH), framework="pt") as file:
        assert tuple(json.loads(file.metadata()["vocabulary"])) == VOCABULARY
