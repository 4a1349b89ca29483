"""Files of captured calls: what is written is read, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attnscope.attention.captured import (
    CapturedCall,
    CaptureError,
    CaptureInfo,
    read_call,
    read_info,
    write_call,
)

INFO: dict[str, Any] = {
    "run_id": "0" * 32, "model": "flux", "layer": "single.3", "step": 2, "sigma": 0.5, "call": 1,
    "scale": 0.25, "mask": False, "dtype": "bfloat16", "text_tokens": 4, "rows": 2, "columns": 3,
}  # fmt: skip


def captured(mask: torch.Tensor | None = None, **info: Any) -> CapturedCall:
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, 10, 16, generator=generator).to(torch.bfloat16).unbind(0)
    return CapturedCall(CaptureInfo(**{**INFO, "mask": mask is not None, **info}), q, k, v, mask)


def raw(path: Path, metadata: dict[str, str], **tensors: torch.Tensor) -> Path:
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("form", ["none", "boolean", "additive"])
def test_a_call_comes_back_as_it_was(tmp_path: Path, form: str) -> None:
    keep = torch.arange(10)[None, None, None] < 7
    mask = {"none": None, "boolean": keep, "additive": torch.where(keep, 0.0, -torch.inf)}[form]
    call = captured(mask)
    write_call(tmp_path / "a.safetensors", call)
    read = read_call(tmp_path / "a.safetensors")
    assert read.info == call.info
    for name in ("query", "key", "value", "mask"):
        before, after = getattr(call, name), getattr(read, name)
        assert (before is None and after is None) or torch.equal(before, after), name
    assert read.query.dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    shared = torch.randn(1, 2, 10, 16)
    view = shared.transpose(1, 2).reshape(1, 10, 32).unflatten(2, (2, 16)).transpose(1, 2)
    call = CapturedCall(CaptureInfo(**INFO), shared, shared, view, None)
    write_call(tmp_path / "a.safetensors", call)
    assert torch.equal(read_call(tmp_path / "a.safetensors").value, view)


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nowhere"):
        write_call(tmp_path / "nowhere" / "a.safetensors", captured())
    assert not list(tmp_path.iterdir())


def test_foreign_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    mine = {"format": "attnscope-capture", "version": "1", "info": json.dumps(INFO)}
    one = torch.zeros(1, 1, 4, 8)
    whole = tmp_path / "whole.safetensors"
    write_call(whole, captured())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors here", encoding="utf-8")
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"query": one}, pickled)
    three = {"query": one, "key": one.clone(), "value": one.clone()}
    cases = {
        tmp_path / "missing.safetensors": "can't be read",
        cut: "can't be read",
        text: "can't be read",
        pickled: "can't be read",
        raw(tmp_path / "model.safetensors", {}, weight=one): "no captured attention call",
        raw(tmp_path / "new.safetensors", {**mine, "version": "2"}, **three): "version is '2'",
        raw(tmp_path / "info.safetensors", {**mine, "info": "{}"}, **three): "run_id in the",
        raw(tmp_path / "json.safetensors", {**mine, "info": "{"}, **three): "info in the",
        raw(tmp_path / "part.safetensors", mine, query=one): "holds no key, value",
        raw(
            tmp_path / "shapes.safetensors", mine, query=one, key=one.clone(),
            value=torch.zeros(1, 1, 5, 8),
        ): "do not fit together",
        raw(tmp_path / "mask.safetensors", mine, **three, mask=one[..., :4].clone()): "disagree",
        raw(
            tmp_path / "misfit.safetensors",
            {**mine, "info": json.dumps({**INFO, "mask": True})},
            **three, mask=torch.zeros(1, 1, 4, 5),
        ): "mask (1, 1, 4, 5) does not fit",
    }  # fmt: skip
    for path, message in cases.items():
        with pytest.raises(CaptureError) as caught:
            read_call(path)
        assert message in str(caught.value), path.name
        assert str(path) in str(caught.value)


def test_what_is_known_is_read_without_the_tensors(tmp_path: Path) -> None:
    write_call(tmp_path / "a.safetensors", captured(rows=None, sigma=None))
    info = read_info(tmp_path / "a.safetensors")
    assert (info.rows, info.sigma, info.layer) == (None, None, "single.3")
