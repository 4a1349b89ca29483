"""The small Flux, and sampling it through ComfyUI's own nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LAYERS = ("double.0", "double.1", "single.0", "single.1", "single.2", "single.3")


def small_flux(seed: int = 0, mlp_ratio: float = 1.0) -> Any:
    """ComfyUI's Flux with small, random, fixed weights; ``mlp_ratio`` is 4 in the real one."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.FluxSchnell(
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64,
            "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": mlp_ratio, "num_heads": 2,
            "depth": 2, "depth_single_blocks": 4, "axes_dim": [16, 56, 56], "theta": 10000,
            "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            if name.endswith(("norm.scale", "norm.weight")):
                weight.fill_(1.0)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.03)
    model.diffusion_model.eval()
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def conditioning(seed: int = 1, tokens: int = 16) -> list[Any]:
    """A CONDITIONING of random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, 64, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, 64, generator=generator)}]]


def latent(side: int = 8, batch: int = 1) -> dict[str, torch.Tensor]:
    """An empty LATENT; ``side`` latent pixels make (side / 2)² tokens."""
    return {"samples": torch.zeros(batch, 16, side, side)}


def sample(
    model: Any,
    *,
    sampler: str = "euler",
    scheduler: str = "simple",
    steps: int = 4,
    cfg: float = 1.0,
    denoise: float = 1.0,
    start: int | None = None,
    last: int | None = None,
    full_denoise: bool = False,
    seed: int = 7,
    side: int = 8,
    batch: int = 1,
    tokens: tuple[int, int] = (16, 16),
    start_latent: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Through ComfyUI's KSampler nodes, under inference mode as ComfyUI does it."""
    import nodes

    positive, negative = conditioning(1, tokens[0]), conditioning(2, tokens[1])
    begin = latent(side, batch) if start_latent is None else start_latent
    with torch.inference_mode():
        (result,) = nodes.common_ksampler(
            model, seed, steps, cfg, sampler, scheduler, positive, negative, begin,
            denoise=denoise, start_step=start, last_step=last, force_full_denoise=full_denoise,
        )  # fmt: skip
    return result["samples"].clone()


def acting(model: Any, acts: dict[int, Callable[[], Any]]) -> Any:
    """A clone that does something before some of its calls, counted from 0."""
    clone = model.clone()
    calls = iter(range(10_000))

    def wrapper(apply: Any, args: dict[str, Any]) -> Any:
        acts.get(next(calls), lambda: None)()
        return apply(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


@contextmanager
def in_prompt(
    graph: dict[str, Any], prompt_id: str, node_id: str, index: int = 0
) -> Iterator[None]:
    """As if a prompt were executing a node."""
    from comfy_execution.graph import DynamicPrompt
    from comfy_execution.progress import reset_progress_state
    from comfy_execution.utils import CurrentNodeContext

    reset_progress_state(prompt_id, DynamicPrompt(graph))
    with CurrentNodeContext(prompt_id, node_id, index):
        yield
