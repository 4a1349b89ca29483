"""Who samples what: this process, the prompt, the sampler's node, the model.

Everything here is read from ComfyUI as far as it is there to be read; what isn't stays empty.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

from ..attention.variant import LayerId
from ..version import __version__
from ..wire import InstanceInfo, ModelInfo, SamplingInfo
from .recipe import gives_list, recipe

log = logging.getLogger("attnscope")

T = TypeVar("T")

INSTANCE_ID = uuid.uuid4().hex
STARTED_AT = time.time()

_FILE_INPUTS = ("unet_name", "ckpt_name", "model_name", "checkpoint", "gguf_name")
_UPSTREAM_LIMIT = 200


def _try(read: Callable[[], T], otherwise: T) -> T:
    try:
        return read()
    except Exception as error:
        log.debug("AttnScope: %s", error)
        return otherwise


def prompt_server() -> Any:
    """ComfyUI's `PromptServer`; None outside a serving process. Imports nothing."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def instance_name() -> str:
    """Host name and port."""
    port = getattr(prompt_server(), "port", None)
    host = _try(socket.gethostname, "") or "comfyui"
    return f"{host}:{port}" if port else host


def instance_info(device: torch.device | None = None) -> InstanceInfo:
    """This process, with the device that samples."""
    # The port is known only once ComfyUI listens; the rest stays what it is.
    return _fixed_info(device).model_copy(update={"name": instance_name()[:200]})


@lru_cache(maxsize=16)
def _fixed_info(device: torch.device | None) -> InstanceInfo:

    def device_name() -> str:
        if device is None or device.type != "cuda":
            return str(device or "")
        return torch.cuda.get_device_name(device)

    def memory() -> int | None:
        import comfy.model_management

        return int(comfy.model_management.get_total_memory(device))

    def comfyui_version() -> str:
        from comfyui_version import __version__ as version

        return str(version)

    return InstanceInfo(
        instance_id=INSTANCE_ID,
        name=instance_name()[:200],
        started_at=STARTED_AT,
        plugin_version=__version__,
        comfyui_version=_try(comfyui_version, ""),
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=_try(device_name, ""),
        device_memory_bytes=_try(memory, None),
    )


@dataclass(frozen=True)
class Place:
    """Where in the prompt a sampler runs.

    Attributes:
        prompt_id: of the prompt, None outside one.
        node_id: of the node that samples.
        list_index: which of several executions of the node.
        graph: node id to node, as far as it is known: ``class_type`` and ``inputs``.
    """

    prompt_id: str | None = None
    node_id: str | None = None
    list_index: int | None = None
    graph: Mapping[str, Any] = None  # type: ignore[assignment]

    def inputs(self, node_id: str | None) -> Mapping[str, Any]:
        """A node's inputs: plain values, and links as ``[node id, output]``."""
        node = (self.graph or {}).get(str(node_id)) or {}
        inputs = node.get("inputs")
        return inputs if isinstance(inputs, Mapping) else {}


def find_place() -> Place:
    """The prompt and node that execute now."""

    def read() -> Place:
        from comfy_execution.progress import get_progress_state
        from comfy_execution.utils import get_executing_context

        context = get_executing_context()
        if context is None:
            return Place()
        dynprompt = get_progress_state().dynprompt
        graph = {node_id: dynprompt.get_node(node_id) for node_id in dynprompt.all_node_ids()}
        return Place(context.prompt_id, context.node_id, context.list_index, graph)

    return _try(read, Place())


def _literal(inputs: Mapping[str, Any], names: tuple[str, ...], kinds: tuple[type, ...]) -> Any:
    for name in names:
        value = inputs.get(name)
        if isinstance(value, kinds) and not isinstance(value, bool):
            return value
    return None


def _links(inputs: Mapping[str, Any]) -> list[str]:
    return [
        str(value[0]) for value in inputs.values() if isinstance(value, list) and len(value) == 2
    ]


def model_file(place: Place) -> str:
    """The file that the nearest loader before the sampler's model input names, or nothing."""
    inputs = place.inputs(place.node_id)
    start = [str(inputs["model"][0])] if isinstance(inputs.get("model"), list) else _links(inputs)
    queue, seen = list(start), set(start)
    while queue and len(seen) < _UPSTREAM_LIMIT:
        inputs = place.inputs(queue.pop(0))
        name = _literal(inputs, _FILE_INPUTS, (str,))
        if name:
            return os.path.basename(str(name).replace("\\", "/"))
        for linked in _links(inputs):
            if linked not in seen:
                seen.add(linked)
                queue.append(linked)
    return ""


def model_layers(diffusion_model: Any) -> tuple[LayerId, ...]:
    """A Flux-family model's blocks in the order in which they run."""
    layers = []
    for kind in ("double", "single"):
        blocks = getattr(diffusion_model, f"{kind}_blocks", None)
        layers += [LayerId(kind, index) for index in range(len(blocks) if blocks else 0)]
    return tuple(layers)


def model_info(
    model_patcher: Any, place: Place
) -> tuple[tuple[LayerId, ...], Callable[[], ModelInfo]]:
    """What is sampled: its layers now, and the rest when it is asked for, on any thread."""
    inner = getattr(model_patcher, "model", None)
    diffusion_model = getattr(inner, "diffusion_model", None)
    nothing: tuple[LayerId, ...] = ()
    layers = _try(lambda: model_layers(diffusion_model), nothing)
    return layers, lambda: _describe(diffusion_model, layers, place)


def _describe(diffusion_model: Any, layers: tuple[LayerId, ...], place: Place) -> ModelInfo:
    return ModelInfo(
        name=(_try(lambda: model_file(place), "") or type(diffusion_model).__name__)[:200],
        parameters=_try(
            lambda: sum(p.numel() for p in diffusion_model.parameters()) or None, None
        ),
        layers=[str(layer) for layer in layers[:1000]],
    )


def sampler_function(sampler: Any) -> str:
    """Name of the sampler's function, such as ``sample_euler``; empty where it has none."""
    function = getattr(sampler, "sampler_function", None)
    function = getattr(function, "func", function)
    return str(getattr(function, "__name__", ""))


def sampling_info(
    *,
    sampler: Any,
    guider: Any,
    sigmas: list[float],
    seed: Any,
    noise: Any,
    place: Place,
) -> SamplingInfo:
    """What is known of the sampling, from the objects first and the prompt's graph second."""
    inputs = place.inputs(place.node_id)
    name = _literal(inputs, ("sampler_name", "sampler"), (str,))
    if name is None:
        name = sampler_function(sampler).removeprefix("sample_").removesuffix("_function")
    cfg = getattr(guider, "cfg", None)
    unknown: list[int] = []
    if seed is None:
        seed = _literal(inputs, ("seed", "noise_seed"), (int,))
    return SamplingInfo(
        sampler=(name or type(sampler).__name__)[:200],
        sigmas=sigmas,
        seed=seed if isinstance(seed, int) else None,
        cfg=float(cfg) if isinstance(cfg, (int, float)) else None,
        denoise=_literal(inputs, ("denoise",), (float, int)),
        latent_shape=_try(lambda: [int(size) for size in noise.shape][:8], unknown),
        prompt_id=place.prompt_id,
        node_id=place.node_id,
        list_index=place.list_index,
    )


def with_recipe(info: SamplingInfo, place: Place) -> SamplingInfo:
    """The same with the hash of what the sampler's inputs come from, where it can be told."""

    def read() -> str | None:
        return recipe(place.graph or {}, place.node_id, place.list_index, gives_list)

    return info.model_copy(update={"recipe": _try(read, None)})
