"""Builds ComfyUI's own Flux around a demo checkpoint.

ComfyUI's loaders can't: they tell a Flux by sizes that this small one does not have.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from .checkpoint import DEFAULT_PATH, Checkpoint, CheckpointError, load_checkpoint, norm_names_to
from .codec import CHANNELS, LinearCodec

CHECKPOINT_ENV = "ATTNSCOPE_DEMO_CHECKPOINT"
"""Names another checkpoint file to use, e.g. one of your own training."""


class DemoLatentFormat(comfy.latent_formats.LatentFormat):
    """16 linear channels; the preview's factors are the codec's own mean colour of a cell."""

    scale_factor = 1.0
    latent_channels = CHANNELS

    def __init__(self, codec: LinearCodec) -> None:
        self.latent_rgb_factors, self.latent_rgb_factors_bias = codec.preview_factors()


def checkpoint_path() -> Path:
    """The demo checkpoint in use: the environment's, else the one beside this file."""
    return Path(os.environ.get(CHECKPOINT_ENV) or DEFAULT_PATH)


def build_base_model(
    config: dict[str, Any],
    codec: LinearCodec,
    *,
    dtype: torch.dtype,
    manual_cast: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Any:
    """ComfyUI's ``model_base.Flux`` with UNINITIALISED weights of the given dtype."""
    model_config = comfy.supported_models.FluxSchnell(config["unet"])
    model_config.set_inference_dtype(dtype, manual_cast)
    model_config.sampling_settings["shift"] = float(config["shift"])
    model_config.latent_format = DemoLatentFormat(codec)
    return model_config.get_model({}, device=device)


def build_patcher(checkpoint: Checkpoint, source: str = "the checkpoint") -> Any:
    """A ModelPatcher (ComfyUI's MODEL) that the stock samplers take."""
    management = comfy.model_management
    load_device = management.get_torch_device()
    offload_device = management.unet_offload_device()
    supported = [torch.bfloat16, torch.float32]
    dtype = management.unet_dtype(
        device=load_device, supported_dtypes=supported, weight_dtype=torch.bfloat16
    )
    if management.is_device_cpu(load_device):
        # 9 M parameters gain nothing from bfloat16 on a CPU, and many CPUs emulate it.
        dtype = torch.float32
    manual_cast = management.unet_manual_cast(dtype, load_device, supported)
    model = build_base_model(
        checkpoint.config, checkpoint.codec, dtype=dtype, manual_cast=manual_cast
    )
    names = set(model.diffusion_model.state_dict())
    weights = norm_names_to(checkpoint.weights, names)
    if set(weights) != names:
        odd = sorted(set(weights) ^ names)
        raise CheckpointError(
            f"The weights in {source} do not fit this ComfyUI's Flux: {', '.join(odd[:4])}"
            + (" …" if len(odd) > 4 else "")
        )
    model.diffusion_model.load_state_dict(weights)
    model.diffusion_model.eval()
    return comfy.model_patcher.ModelPatcher(
        model, load_device=load_device, offload_device=offload_device
    )


def load_demo_model(path: Path | None = None) -> Any:
    """The demo MODEL from a checkpoint file; CheckpointError tells the path."""
    path = path or checkpoint_path()
    return build_patcher(load_checkpoint(path), source=str(path))
