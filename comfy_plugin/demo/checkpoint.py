"""The demo checkpoint: one safetensors file with weights, codec, vocabulary and configuration.

Nothing is ever unpickled: only safetensors is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .captions import VOCABULARY
from .codec import LinearCodec

FORMAT = "attnscope-demo-flux"
FORMAT_VERSION = 1
DEFAULT_PATH = Path(__file__).parent / "demo_flux.safetensors"

UNET_CONFIG: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}

_MODEL, _CODEC = "model.", "codec."


class CheckpointError(ValueError):
    """A file that is not a demo checkpoint; the message holds its path."""


@dataclass(frozen=True)
class Checkpoint:
    """weights: Flux state dict with norms named ``….scale``; config: see ``save_checkpoint``."""

    weights: dict[str, Tensor]
    codec: LinearCodec
    config: dict[str, Any]


def norm_names_to(weights: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Rename norm weights to what a model calls them: ``.scale`` or, later, ``.weight``."""
    renamed = {}
    for name, value in weights.items():
        if name not in names and name.endswith("_norm.scale"):
            name = name[: -len("scale")] + "weight"
        elif name not in names and name.endswith("_norm.weight"):
            name = name[: -len("weight")] + "scale"
        renamed[name] = value
    return renamed


def save_checkpoint(
    path: Path, weights: dict[str, Tensor], codec: LinearCodec, config: dict[str, Any]
) -> None:
    """Write weights as bfloat16 and the codec as float32.

    config: ``unet`` (Flux's parameters), ``shift`` (of the noise schedule) and anything that
    tells how the weights came about. All of it must be JSON.
    """
    names = {name.replace("_norm.weight", "_norm.scale") for name in weights}
    tensors = {
        _MODEL + name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in norm_names_to(weights, names).items()
    }
    for part in _codec_parts():
        tensors[_CODEC + part] = getattr(codec, part).detach().cpu().float().contiguous()
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(config, sort_keys=True),
        "vocabulary": json.dumps(list(VOCABULARY)),
    }
    # Written beside and moved, so that a reader never sees half a file.
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, str(partial), metadata=metadata)
    partial.replace(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a demo checkpoint; CheckpointError, with the path, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No demo checkpoint at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is a safetensors file but not an AttnScope demo checkpoint "
                    f"(its metadata lacks format={FORMAT!r})."
                )
            if metadata.get("format_version") != str(FORMAT_VERSION):
                raise CheckpointError(
                    f"{path} has demo checkpoint format {metadata.get('format_version')}; "
                    f"this version of AttnScope reads format {FORMAT_VERSION}."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(metadata["config"])
        vocabulary = json.loads(metadata["vocabulary"])
        codec = LinearCodec(**{part: tensors.pop(_CODEC + part) for part in _codec_parts()})
        if not isinstance(config["unet"], dict):
            raise TypeError("config.unet is not an object")
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged demo checkpoint: {error!r}") from error
    if tuple(vocabulary) != VOCABULARY:
        raise CheckpointError(
            f"{path} was trained with another vocabulary than this version's prompt encoder has."
        )
    weights = {name[len(_MODEL) :]: t for name, t in tensors.items() if name.startswith(_MODEL)}
    return Checkpoint(weights=weights, codec=codec, config=config)


def _codec_parts() -> tuple[str, ...]:
    return ("mean", "to_latent", "to_pixels")
