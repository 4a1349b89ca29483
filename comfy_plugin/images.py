"""Pictures of a run: ComfyUI's own previews, and what its save and preview nodes made of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..wire import ImageTaken
from .identity import Place, prompt_server
from .outbox import Draft

log = logging.getLogger("attnscope")

FINAL_PIXELS = 2048 * 2048
FINAL_BYTES = 8 * 2**20
"""Up to here a finished picture is sent as it is: 1.2 to 2.2 bytes a pixel as PNG. The server
takes no larger image by default."""

FINAL_SIDE = 1024
"""Longest side of a finished picture that is too large for that."""

MOST_FINALS = 4
PROMPT_PATIENCE_S = 900.0
"""How long a prompt may go on after its sampler before its pictures are given up."""

_POLL_S = 0.25


def encode(image: Any, longest: int, quality: int = 85) -> tuple[bytes, int, int]:
    """A PIL image as JPEG, no side longer than ``longest`` pixels; with its width and height."""
    image = image.convert("RGB")
    if max(image.size) > longest:
        image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue(), image.width, image.height


def encode_losslessly(image: Any) -> tuple[bytes, int, int] | None:
    """A PIL image as PNG in RGB, with its width and height; None where that is too large."""
    if image.width * image.height > FINAL_PIXELS:
        return None
    buffer = io.BytesIO()
    # Level 4 is ComfyUI's own: higher ones cost two to three times the time for 2 %.
    image.convert("RGB").save(buffer, format="PNG", compress_level=4)
    data = buffer.getvalue()
    return (data, image.width, image.height) if len(data) <= FINAL_BYTES else None


class PreviewDraft:
    """A preview that is still to be encoded."""

    droppable = True
    urgent = False

    def __init__(self, run_id: str, step: int, image: Any, longest: int) -> None:
        self.run_id = run_id
        self._at = time.time()
        self._step = step
        self._image = image
        self._longest = longest

    def ready(self) -> bool:
        return True

    def build(self, seq: int) -> ImageTaken:
        data, width, height = encode(self._image, self._longest)
        return image_event(self.run_id, seq, self._at, "preview", self._step, data, width, height)


class FinalDraft:
    """A finished picture, read from the file that ComfyUI wrote."""

    droppable = True
    urgent = True

    def __init__(self, run_id: str, path: str) -> None:
        self.run_id = run_id
        self._path = path

    def ready(self) -> bool:
        return True

    def build(self, seq: int) -> ImageTaken | None:
        from PIL import Image

        media_type = "image/png"
        try:
            with Image.open(self._path) as image:
                encoded = encode_losslessly(image)
                if encoded is None:
                    media_type = "image/jpeg"
                    encoded = encode(image, FINAL_SIDE, quality=92)
        except OSError as error:
            log.debug("AttnScope: %s", error)
            return None
        return image_event(
            self.run_id, seq, time.time(), "final", None, *encoded, media_type=media_type
        )


def image_event(
    run_id: str,
    seq: int,
    at: float,
    kind: str,
    step: int | None,
    data: bytes,
    width: int,
    height: int,
    media_type: str = "image/jpeg",
) -> ImageTaken:
    """The message; its field holds the bytes encoded once, as the wire's type expects them."""
    import base64

    return ImageTaken(
        run_id=run_id,
        seq=seq,
        at=at,
        image_kind=kind,
        step=step,
        media_type=media_type,
        width=width,
        height=height,
        data=base64.b64encode(data),
    )


class Previews:
    """Listens to ComfyUI's progress for one run's previews, where that API exists."""

    def __init__(self, run_id: str, node_id: str | None, put: Callable[[Draft], None]) -> None:
        self._run_id = run_id
        self._node_id = node_id
        self._put = put
        self._registry: Any = None
        self._name = f"attnscope-{run_id}"

    def start(self) -> None:
        """Register with ComfyUI."""
        try:
            from comfy_execution.progress import ProgressHandler, get_progress_state
        except ImportError:
            return

        take = self._take

        class Handler(ProgressHandler):
            def update_handler(self, *args: Any, **kwargs: Any) -> None:
                take(*args, **kwargs)

        registry = get_progress_state()
        registry.register_handler(Handler(self._name))
        self._registry = registry

    def stop(self) -> None:
        """Take the registration back."""
        registry, self._registry = self._registry, None
        if registry is not None:
            registry.handlers.pop(self._name, None)

    def _take(
        self,
        node_id: Any,
        value: float,
        max_value: float,
        state: Any = None,
        prompt_id: Any = None,
        image: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        try:
            if image is None or (self._node_id is not None and str(node_id) != self._node_id):
                return
            _, picture, longest = image
            step = max(0, round(value) - 1)
            self._put(PreviewDraft(self._run_id, step, picture, int(longest or 512)))
        except Exception as error:
            log.debug("AttnScope: a preview was left out: %s", error)


def downstream(graph: Mapping[str, Any], node_id: str, barriers: Iterable[str] = ()) -> set[str]:
    """Nodes that use a node's outputs, directly or not, but not through a barrier."""
    users: dict[str, set[str]] = {}
    for name, node in graph.items():
        inputs = (node or {}).get("inputs") or {}
        for value in inputs.values():
            if isinstance(value, list) and len(value) == 2:
                users.setdefault(str(value[0]), set()).add(str(name))
    stops = set(barriers) - {node_id}
    found: set[str] = set()
    queue = deque([node_id])
    while queue:
        for user in users.get(queue.popleft(), ()):
            if user not in found and user not in stops:
                found.add(user)
                queue.append(user)
    return found


def choose_images(
    outputs: Mapping[str, Any], nodes: set[str], index: int, count: int
) -> list[dict[str, Any]]:
    """The files that a prompt's history names for one of ``count`` executions of a sampler.

    Args:
        outputs: the history's ``outputs``, by node.
        nodes: whose files to take.
        index: which execution, from 0.
        count: of executions of the sampler within the prompt.
    """
    chosen: list[dict[str, Any]] = []
    for node_id, output in outputs.items():
        if str(node_id) not in nodes or not isinstance(output, Mapping):
            continue
        files = [file for file in output.get("images") or () if isinstance(file, dict)]
        if count > 1 and len(files) % count == 0:
            share = len(files) // count
            files = files[index * share : (index + 1) * share]
        chosen += files
    saved = [file for file in chosen if file.get("type") == "output"]
    return (saved or chosen)[:MOST_FINALS]


def file_path(file: Mapping[str, Any]) -> str | None:
    """Where a file of the history lies; None for anything outside ComfyUI's own folders."""
    import folder_paths

    base = folder_paths.get_directory_by_type(str(file.get("type", "output")))
    if base is None:
        return None
    base = os.path.realpath(base)
    path = os.path.realpath(
        os.path.join(base, str(file.get("subfolder", "")), str(file.get("filename", "")))
    )
    return path if os.path.commonpath([base, path]) == base else None


class FinalImages:
    """Waits for the end of the prompt and sends the pictures that came of the run."""

    def __init__(
        self,
        run_id: str,
        place: Place,
        siblings: Callable[[], tuple[int, int, set[str]]],
        put: Callable[[Draft], None],
    ) -> None:
        """
        Args:
            run_id: of the run.
            place: of its sampler.
            siblings: asked when the prompt has ended: which execution of the node this was, of
                how many, and all nodes of the prompt that sampled.
            put: takes the drafts.
        """
        self._run_id = run_id
        self._place = place
        self._siblings = siblings
        self._put = put

    async def run(self) -> None:
        """Wait, look, send. Gives up quietly."""
        outputs = await self._outputs()
        node_id = self._place.node_id
        if not outputs or node_id is None or not self._place.graph:
            return
        index, count, samplers = self._siblings()
        graph = self._place.graph
        # What another sampler has worked on since shows that one's work, if there is a choice.
        for barriers in (samplers, ()):
            files = choose_images(outputs, downstream(graph, node_id, barriers), index, count)
            if files:
                break
        for file in files:
            path = file_path(file)
            if path is not None:
                self._put(FinalDraft(self._run_id, path))

    async def _outputs(self) -> Mapping[str, Any]:
        queue = getattr(prompt_server(), "prompt_queue", None)
        if queue is None or self._place.prompt_id is None:
            return {}
        deadline = time.monotonic() + PROMPT_PATIENCE_S
        while time.monotonic() < deadline:
            running = self._running(queue)
            # Asked in this order, because ComfyUI files a prompt when it stops running it.
            history = queue.get_history(
                prompt_id=self._place.prompt_id,
                map_function=lambda item: dict(item.get("outputs") or {}),
            )
            if self._place.prompt_id in history:
                return history[self._place.prompt_id]
            if not running:
                return {}
            await asyncio.sleep(_POLL_S)
        return {}

    def _running(self, queue: Any) -> bool:
        with contextlib.suppress(Exception):
            running = list(queue.currently_running.values())
            return any(self._place.prompt_id in item[:2] for item in running)
        return True
