"""Nodes of the demo: load the small Flux, encode a prompt, and go between images and latents."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import comfy.model_management
import torch
from comfy_api.latest import io

from .captions import FILLERS, VOCABULARY
from .checkpoint import load_checkpoint
from .codec import CELL, LinearCodec
from .model import checkpoint_path, load_demo_model
from .prompt import encode_prompt

CATEGORY = "AttnScope/demo"
EXAMPLE = "small red circle left of large blue square"


@lru_cache(maxsize=2)
def _codec(path: Path, changed: int) -> LinearCodec:
    return load_checkpoint(path).codec


def demo_codec() -> LinearCodec:
    """The codec of the checkpoint in use; read again when the file changes."""
    path = checkpoint_path()
    return _codec(path, path.stat().st_mtime_ns if path.exists() else 0)


class AttnScopeDemoModel(io.ComfyNode):
    """Loads the small Flux that comes with AttnScope."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttnScopeDemoModel",
            display_name="AttnScope Demo Model",
            category=CATEGORY,
            description=(
                "A 9-million-parameter Flux that draws two coloured shapes: runs in seconds, on a "
                "CPU too, with the stock KSampler. Use EmptySD3LatentImage, cfg 1, euler, simple."
            ),
            inputs=[],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        path = checkpoint_path()
        return f"{path}:{path.stat().st_mtime_ns if path.exists() else 'missing'}"

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_demo_model())


class AttnScopeDemoPrompt(io.ComfyNode):
    """Encodes a prompt of the demo's small vocabulary."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttnScopeDemoPrompt",
            display_name="AttnScope Demo Prompt",
            category=CATEGORY,
            description=(
                f'One thing ("{EXAMPLE.split(" left")[0]} at top left") or two with a relation '
                f'("{EXAMPLE}"). Words: {", ".join(VOCABULARY)}. Ignored: '
                f"{', '.join(sorted(FILLERS))}. Empty text is the negative prompt."
            ),
            inputs=[
                io.String.Input("text", default=EXAMPLE, multiline=True),
                io.Int.Input(
                    "width",
                    default=512,
                    min=128,
                    max=2048,
                    step=16,
                    tooltip="The latent's width in pixels: the model reads the picture's size "
                    "from the prompt.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=128,
                    max=2048,
                    step=16,
                    tooltip="The latent's height in pixels.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        try:
            # A text that comes over a wire is not known yet: None.
            encode_prompt(text or "", 512, 512)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, text: str, width: int, height: int) -> io.NodeOutput:
        context, pooled = encode_prompt(text, width, height)
        device = comfy.model_management.intermediate_device()
        return io.NodeOutput(
            [[context[None].to(device), {"pooled_output": pooled[None].to(device)}]]
        )


class AttnScopeDemoDecode(io.ComfyNode):
    """Turns the demo's latents into images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttnScopeDemoDecode",
            display_name="AttnScope Demo Decode",
            category=CATEGORY,
            description="Linear decoder of the demo model's 16-channel latents; needs no VAE.",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        images = demo_codec().decode(samples["samples"])
        return io.NodeOutput(images.to(comfy.model_management.intermediate_device()))


class AttnScopeDemoEncode(io.ComfyNode):
    """Turns images into the demo's latents, for image to image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttnScopeDemoEncode",
            display_name="AttnScope Demo Encode",
            category=CATEGORY,
            description=(
                "Linear encoder for image to image with the demo model. Sides are cropped to "
                "multiples of 16 pixels."
            ),
            inputs=[io.Image.Input("image")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor) -> io.NodeOutput:
        step = 2 * CELL
        height, width = (side // step * step for side in image.shape[1:3])
        if not height or not width:
            raise ValueError(
                f"The image is {image.shape[2]}×{image.shape[1]} pixels, "
                f"smaller than one patch of {step}×{step}."
            )
        latent = demo_codec().encode(image[:, :height, :width, :3])
        return io.NodeOutput({"samples": latent.to(comfy.model_management.intermediate_device())})


DEMO_NODES: list[type[io.ComfyNode]] = [
    AttnScopeDemoModel,
    AttnScopeDemoPrompt,
    AttnScopeDemoDecode,
    AttnScopeDemoEncode,
]
