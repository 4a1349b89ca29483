"""Room in the device's memory, from ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger("attnscope")


def reserve_for(model_patcher: Any) -> Callable[[int, torch.device], None]:
    """What makes room while a model is sampled.

    ComfyUI unloads what it has loaded and this sampling doesn't use. The sampled model itself and
    whatever else is in use, such as a control net, stay: unloading them in the middle of a call
    would leave the call with weights on two devices.

    Args:
        model_patcher: the sampled model.
    """

    def reserve(needed: int, device: torch.device) -> None:
        try:
            import comfy.model_management as management

            keep = [
                loaded
                for loaded in management.current_loaded_models
                if loaded.currently_used or _same(loaded, model_patcher)
            ]
            management.free_memory(needed, device, keep_loaded=keep)
        except Exception:
            # The call may fit without; if it doesn't, it falls back for want of memory.
            log.warning(
                "AttnScope: ComfyUI could not be asked for %.0f MB", needed / 1e6, exc_info=True
            )

    return reserve


def _same(loaded: Any, model_patcher: Any) -> bool:
    """Whether a loaded model shares its weights with the sampled one: clones do."""
    inner = getattr(getattr(loaded, "model", None), "model", None)
    return inner is not None and inner is getattr(model_patcher, "model", None)
