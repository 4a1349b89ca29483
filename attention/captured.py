"""Captured attention calls: query, key and value of a real model in safetensors files.

One file is one call. Its tensors are ``query`` ``[B, H, Nq, D]``, ``key`` ``[B, H, Nk, D]``,
``value`` ``[B, H, Nk, Dv]`` and, where the call had one, ``mask`` (boolean, True: attend, or
additive float; broadcastable to ``[B, H, Nq, Nk]``), in the dtype in which the model ran. What
else is known stands as JSON in the file's metadata. Nothing in such a file is ever executed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

FORMAT = "attnscope-capture"
VERSION = "1"
SUFFIX = ".safetensors"


class CaptureError(ValueError):
    """A file that can't be used; the message names the file and what is wrong with it."""


class CaptureInfo(BaseModel):
    """What is known of a captured call.

    Attributes:
        run_id: run that it belongs to.
        model: name of the model.
        layer: block that called, such as ``single.3``.
        step: index into the schedule, from 0.
        sigma: noise level; None where unknown.
        call: which call of the layer within the step, from 0: heun and CFG make several.
        scale: factor on q·k.
        mask: whether the call had a mask.
        dtype: of the query, such as ``bfloat16``.
        text_tokens: text tokens, which come first; None where unknown.
        rows: of the grid of image tokens; None where unknown.
        columns: of the grid of image tokens, which are in raster order; None where unknown.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str = Field(max_length=64)
    model: str = Field(max_length=200)
    layer: str = Field(max_length=100)
    step: int = Field(ge=0)
    sigma: float | None
    call: int = Field(ge=0)
    scale: float
    mask: bool
    dtype: str = Field(max_length=20)
    text_tokens: int | None = Field(default=None, ge=0)
    rows: int | None = Field(default=None, ge=1)
    columns: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class CapturedCall:
    """A captured call; the tensors as the module describes them, on the CPU."""

    info: CaptureInfo
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None


def write_call(path: Path, call: CapturedCall) -> None:
    """Write a call to a file, which appears whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    tensors = {"query": call.query, "key": call.key, "value": call.value}
    if call.mask is not None:
        tensors["mask"] = call.mask
    metadata = {"format": FORMAT, "version": VERSION, "info": call.info.model_dump_json()}
    part = path.with_suffix(".part")
    try:
        save_file(_own_memory(tensors), part, metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _own_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous on the CPU, no two of them in the same memory, which could not be saved."""
    seen: set[int] = set()
    packed = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        packed[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return packed


def read_info(path: Path) -> CaptureInfo:
    """What is known of a file's call, without its tensors.

    Raises:
        CaptureError: the file is missing, damaged, or none of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise CaptureError(f"{path}: can't be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise CaptureError(
            f"{path}: is no captured attention call; allowed: files that the AttnScope Monitor "
            "node wrote"
        )
    if metadata.get("version") != VERSION:
        raise CaptureError(
            f"{path}: version is {metadata.get('version')!r}; allowed: {VERSION!r}, which this "
            "AttnScope reads"
        )
    try:
        info = CaptureInfo.model_validate_json(metadata.get("info", ""))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "info"
        raise CaptureError(f"{path}: {field} in the metadata: {first['msg']}") from None
    missing = {"query", "key", "value"} - names
    if missing:
        raise CaptureError(f"{path}: holds no {', '.join(sorted(missing))}")
    return info


def read_call(path: Path) -> CapturedCall:
    """Read a file.

    Raises:
        CaptureError: the file is missing, damaged, or none of ours.
    """
    info = read_info(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CaptureError(f"{path}: can't be read: {error}") from None
    call = CapturedCall(
        info, tensors["query"], tensors["key"], tensors["value"], tensors.get("mask")
    )
    _check_shapes(path, call)
    return call


def _check_shapes(path: Path, call: CapturedCall) -> None:
    query, key, value = call.query, call.key, call.value
    fits = (
        query.ndim == key.ndim == value.ndim == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[3] == key.shape[3]
        and key.shape[2] == value.shape[2]
        and query.is_floating_point()
    )
    if not fits:
        raise CaptureError(
            f"{path}: query {tuple(query.shape)}, key {tuple(key.shape)} and value "
            f"{tuple(value.shape)} do not fit together; allowed: [B, H, Nq, D], [B, H, Nk, D], "
            "[B, H, Nk, Dv]"
        )
    if call.info.mask != (call.mask is not None):
        raise CaptureError(f"{path}: the metadata and the tensors disagree about a mask")
    if call.mask is not None:
        try:
            torch.broadcast_shapes(call.mask.shape, (*query.shape[:3], key.shape[2]))
        except RuntimeError:
            raise CaptureError(
                f"{path}: mask {tuple(call.mask.shape)} does not fit the query and key"
            ) from None
