"""Checkpoints of students: one safetensors file with the rest as JSON in its metadata.

Tensors are ``<layer>|student|<name>`` and ``<layer>|optimizer|<name>/<what>``, all float32.
Nothing in such a file is ever executed. A file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .student import StudentOptions

FORMAT = "attnscope-flux2ttr"
VERSION = "1"
SUFFIX = ".safetensors"


class CheckpointError(ValueError):
    """A file that can't be read or written; the message names its exact path and what is wrong."""


class AverageInfo(BaseModel):
    """A moving average, see `readiness.MovingAverage`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: float = 0.0
    weight: float = Field(0.0, ge=0.0)


class LayerInfo(BaseModel):
    """What is known of a layer's student besides its tensors.

    Attributes:
        heads: H.
        head_dim: D.
        updates: that it has had.
        loss: average of the loss.
        nmse: average of the held-out NMSE.
        ready: whether it was ready.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    updates: int = Field(ge=0)
    loss: AverageInfo
    nmse: AverageInfo
    ready: bool


class CheckpointInfo(BaseModel):
    """What is known of all students of a file.

    Attributes:
        student: kind, see `StudentOptions`.
        features: likewise.
        window_radius: likewise.
        landmarks: likewise.
        model: name of the model that taught, for people.
        weights: its `ModelPrint.weights`; empty where unknown.
        layers: by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: str
    features: int
    window_radius: int
    landmarks: int
    model: str = ""
    weights: str = ""
    layers: dict[str, LayerInfo] = Field(default_factory=dict)

    def of_layer(self, layer: LayerInfo) -> StudentOptions:
        """What a layer's student is built by."""
        return StudentOptions(
            self.student, layer.heads, layer.head_dim, self.features, self.window_radius,
            self.landmarks,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Tensors of a layer's student.

    Attributes:
        student: its state by name.
        optimizer: see `Trainer.state`.
    """

    student: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor] = field(default_factory=dict)


def write(path: Path, info: CheckpointInfo, tensors: Mapping[str, LayerTensors]) -> None:
    """Write a checkpoint in place of an earlier one, which stays whole if that fails.

    Args:
        path: absolute; folders are made.
        info: see `CheckpointInfo`.
        tensors: by layer.

    Raises:
        CheckpointError: the disk is full, the path can't be written.
    """
    flat = {}
    for layer, of_layer in tensors.items():
        for part in ("student", "optimizer"):
            for name, tensor in getattr(of_layer, part).items():
                flat[f"{layer}|{part}|{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    metadata = {"format": FORMAT, "version": VERSION, "info": info.model_dump_json()}
    # A name of its own: two processes may write the same checkpoint.
    part_path = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(flat, part_path, metadata)
        _to_disk(part_path)
        os.replace(part_path, path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part_path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Survives a loss of power from now on; folders can't be opened so on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> tuple[CheckpointInfo, dict[str, LayerTensors]]:
    """Read a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, of another version, or none of ours.
    """
    info = read_info(path)
    try:
        flat = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {
        layer: {"student": {}, "optimizer": {}} for layer in info.layers
    }
    for key, tensor in flat.items():
        layer, _, rest = key.partition("|")
        part, _, name = rest.partition("|")
        if layer not in parts or part not in parts[layer]:
            raise CheckpointError(f"{path}: holds {key!r}, which its metadata doesn't name")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {key!r} holds NaN or infinity")
        parts[layer][part][name] = tensor
    return info, {layer: LayerTensors(**found) for layer, found in parts.items()}


def read_info(path: Path) -> CheckpointInfo:
    """What is known of a checkpoint, without its tensors.

    Raises:
        CheckpointError: the file is missing, damaged, of another version, or none of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is no checkpoint of Flux2TTR; allowed: files that the Flux2TTR node wrote"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version is {metadata.get('version')!r}; allowed: {VERSION!r}, which this "
            "AttnScope reads"
        )
    try:
        return CheckpointInfo.model_validate_json(metadata.get("info", ""))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "info"
        raise CheckpointError(f"{path}: {place} in the metadata: {first['msg']}") from None


def check_fit(
    path: Path, info: CheckpointInfo, options: StudentOptions, weights: str, named: bool
) -> None:
    """Whether a checkpoint is of the students that a node asks for.

    Args:
        path: of the checkpoint, for the message.
        info: of it.
        options: of the node; heads and head_dim don't count.
        weights: the sampled model's `ModelPrint.weights`; empty where unknown.
        named: whether the user named the file: then another model's students are taken, such as
            those of the model without a LoRA.

    Raises:
        CheckpointError: another kind or size of student, or another model.
    """
    for name, has in (
        ("student", info.student), ("features", info.features),
        ("window_radius", info.window_radius), ("landmarks", info.landmarks),
    ):  # fmt: skip
        wanted = options.kind if name == "student" else getattr(options, name)
        if has == wanted:
            continue
        raise CheckpointError(
            f"{path}: its {name} is {has!r}; allowed: {wanted!r}, which the node asks for. Change "
            "the node's setting, or name another checkpoint"
        )
    if not named and info.weights and weights and info.weights != weights:
        raise CheckpointError(f"{path}: is of another model ({info.model})")
