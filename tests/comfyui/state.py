"""Everything of ComfyUI and of the process that a run of ours could have left changed."""

from __future__ import annotations

import gc
import importlib
import logging
import signal
import sys
import threading
from typing import Any

MODULES = (
    "comfy.ldm.flux.math", "comfy.ldm.flux.layers", "comfy.ldm.flux.model",
    "comfy.ldm.modules.attention", "comfy.samplers", "comfy.sample", "comfy.sampler_helpers",
    "comfy.k_diffusion.sampling", "comfy.extra_samplers.uni_pc", "comfy.patcher_extension",
    "comfy.model_patcher", "comfy.model_base", "comfy.hooks", "comfy.utils", "latent_preview",
    "comfy_execution.progress", "comfy_execution.utils", "nodes", "torch.nn.functional",
)  # fmt: skip

CLASSES = (
    ("comfy.samplers", "CFGGuider"), ("comfy.samplers", "KSAMPLER"),
    ("comfy.samplers", "KSamplerX0Inpaint"), ("comfy.model_patcher", "ModelPatcher"),
    ("comfy.model_base", "BaseModel"), ("comfy.model_base", "Flux"),
    ("comfy.ldm.flux.model", "Flux"), ("comfy.ldm.flux.layers", "DoubleStreamBlock"),
    ("comfy.ldm.flux.layers", "SingleStreamBlock"), ("comfy.patcher_extension", "WrapperExecutor"),
    ("comfy_execution.progress", "ProgressRegistry"),
)  # fmt: skip


def _shape(value: Any) -> Any:
    """Nested containers by content, everything else by identity."""
    if isinstance(value, dict):
        return {str(key): _shape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shape(item) for item in value]
    return id(value)


def of_model(model: Any) -> dict[str, Any]:
    """A MODEL's tables, and the hooks and patched functions of its network."""
    network = model.model.diffusion_model
    hooks = {
        name: [
            len(module._forward_hooks), len(module._forward_pre_hooks),
            sorted(key for key in vars(module) if key == "forward"),
        ]
        for name, module in network.named_modules()
    }  # fmt: skip
    return {
        "wrappers": _shape(model.wrappers),
        "callbacks": _shape(model.callbacks),
        "model_options": _shape(model.model_options),
        "injections": _shape(model.injections),
        "object_patches": _shape(model.object_patches),
        "attachments": _shape(model.attachments),
        "patches": sorted(map(str, model.patches)),
        "hooks": hooks,
    }


def of_process(*models: Any) -> dict[str, Any]:
    """What is there now; compare two of these with `differences`."""
    import comfy.utils
    from comfy_execution.progress import get_progress_state

    # ComfyUI makes its registry when it is first asked for.
    handlers = sorted(get_progress_state().handlers)
    state: dict[str, Any] = {"progress handlers": handlers}
    for name in MODULES:
        for key, value in vars(importlib.import_module(name)).items():
            if key not in ("__builtins__", "__warningregistry__"):
                state[f"{name}.{key}"] = id(value)
    for module, name in CLASSES:
        for key, value in vars(getattr(importlib.import_module(module), name)).items():
            state[f"{module}.{name}.{key}"] = id(value)
    for index, model in enumerate(models):
        for key, value in of_model(model).items():
            state[f"model {index}: {key}"] = value
    state["progress hook"] = id(comfy.utils.PROGRESS_BAR_HOOK)
    state["threads"] = sorted(
        thread.name for thread in threading.enumerate() if thread.name != "receiver"
    )
    for name in (None, "attnscope", "asyncio", "aiohttp"):
        logger = logging.getLogger(name)
        state[f"logging {name}"] = (_shape(logger.handlers), logger.level, _shape(logger.filters))
    state["excepthooks"] = (id(sys.excepthook), id(threading.excepthook))
    state["meta path"] = _shape(sys.meta_path)
    state["signals"] = [id(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    state["gc callbacks"] = _shape(gc.callbacks)
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is no longer as it was."""
    return sorted(
        key
        for key in before.keys() | after.keys()
        if before.get(key, "absent") != after.get(key, "absent")
    )
