"""Writes query, key and value of chosen calls of a run, for ``attnscope evaluate``.

Where capture is on for a call, its tensors are copied to the CPU at once, which waits for the
device: that is what the user asked for. Files are written by a thread of its own, bounded in
bytes. Whatever fails is logged once, ends the capture and leaves the sampling alone.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..attention.captured import SUFFIX, CapturedCall, CaptureInfo, write_call
from ..attention.selection import Layers, Steps
from ..attention.settings import MonitorSettings, VariantSettings
from ..attention.token_layout import TokenLayout
from ..attention.variant import LayerId
from .layouts import AttentionCall

log = logging.getLogger("attnscope")

FOLDER = "attnscope-captures"
"""Below ComfyUI's output folder."""

WAITING_BYTES = 2**30
"""Copies that may wait for the disk. What comes on top is left out and counted."""

UNKNOWN = LayerId("unknown", 0)


def output_folder() -> Path:
    """Where captures go: below ComfyUI's output folder."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / FOLDER


def capture_for(
    settings: VariantSettings,
    run_id: str,
    *,
    model: Callable[[], str],
) -> Capture | None:
    """The capture that a run's settings ask for; None where they ask for none.

    Args:
        settings: of the run.
        run_id: names the folder.
        model: tells the model's name; called from another thread.
    """
    if not isinstance(settings, MonitorSettings):
        return None
    layers = Layers.parse(settings.capture_layers)
    if not layers:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Capture(
        output_folder() / f"{stamp}-{run_id[:8]}",
        run_id,
        layers=layers,
        steps=Steps.parse(settings.capture_steps),
        max_bytes=settings.capture_max_mb * 10**6,
        model=model,
    )


class Capture:
    """Takes calls on the sampler's thread and writes them on its own."""

    def __init__(
        self,
        folder: Path,
        run_id: str,
        *,
        layers: Layers,
        steps: Steps,
        max_bytes: int,
        model: Callable[[], str],
    ) -> None:
        """
        Args:
            folder: for the files; made with the first of them.
            run_id: of the run.
            layers: whose calls are taken.
            steps: at which they are taken.
            max_bytes: of tensors in all.
            model: tells the model's name; called on the writing thread.
        """
        self.folder = folder
        self._run_id = run_id
        self._layers = layers
        self._steps = steps
        self._left = max_bytes
        self._model = model
        self._counts: dict[tuple[int, str], int] = {}
        self._queue: queue.SimpleQueue[tuple[CapturedCall, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._left_out = 0
        self._written = 0
        self._bytes = 0
        self._off = False
        self._failed = False
        self._thread: threading.Thread | None = None

    def take(
        self, call: AttentionCall, layer: LayerId | None, sigma: float | None, step: int, *,
        layout: TokenLayout | None = None, text_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """Take a call, if it is one of those that were chosen. Never raises.

        Args:
            call: with its tensors.
            layer: that calls.
            sigma: of the step.
            step: index into the schedule.
            layout: of its tokens; None where it isn't certain.
            text_tokens: where they alone are known.
        """
        try:
            block = UNKNOWN if layer is None else layer
            chosen = self._layers.has(block.block_type, block.block_index)
            if not self._off and chosen and self._steps.has(step):
                self._take(call, str(block), sigma, step, layout, text_tokens)
        except Exception:
            self._fail()

    def close(self) -> None:
        """No more calls. What was taken is still written; nothing waits for it here."""
        self._off = True
        if self._thread is not None:
            self._queue.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until everything is written; whether it is."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _take(
        self, call: AttentionCall, layer: str, sigma: float | None, step: int,
        layout: TokenLayout | None, text_tokens: int | None,
    ) -> None:  # fmt: skip
        number = self._counts.get((step, layer), 0)
        self._counts[step, layer] = number + 1
        mask = None if call.mask is None else _unexpanded(call.mask)
        tensors = [t for t in (call.query, call.key, call.value, mask) if t is not None]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size > self._left:
            self._off = True
            log.warning(
                "AttnScope: capture ends at step %d, layer %s: the call's %.1f MB exceed what is "
                "left of capture_max_mb", step, layer, size / 1e6,
            )  # fmt: skip
            return
        with self._lock:
            if self._waiting and self._waiting + size > WAITING_BYTES:
                self._left_out += 1
                return
            self._waiting += size
        self._left -= size
        rows, columns = None, None
        if layout is not None:
            text_tokens = layout.text_tokens
            if len(layout.grids) == 1:
                rows, columns = layout.grids[0]
        info = CaptureInfo(
            run_id=self._run_id,
            model="",
            layer=layer,
            step=step,
            sigma=sigma,
            call=number,
            scale=call.scale,
            mask=mask is not None,
            dtype=str(call.query.dtype).removeprefix("torch."),
            text_tokens=text_tokens,
            rows=rows,
            columns=columns,
        )
        captured = CapturedCall(
            info,
            _copy(call.query),
            _copy(call.key),
            _copy(call.value),
            None if mask is None else _copy(mask),
        )
        if self._thread is None:
            # Not a daemon: what was captured is on disk when the process ends.
            self._thread = threading.Thread(target=self._write, name="attnscope-capture")
            self._thread.start()
        self._queue.put((captured, size))

    def _write(self) -> None:
        model = None
        while (item := self._queue.get()) is not None:
            call, size = item
            try:
                if model is None:
                    model = self._model()
                    self.folder.mkdir(parents=True, exist_ok=True)
                if not self._failed:
                    info = call.info.model_copy(update={"model": model[:200]})
                    call = CapturedCall(info, call.query, call.key, call.value, call.mask)
                    write_call(self.folder / _file_name(info), call)
                    self._written += 1
                    self._bytes += size
            except Exception:
                self._fail()
            finally:
                with self._lock:
                    self._waiting -= size
        log.info(
            "AttnScope: %d captured calls (%.1f MB) in %s%s",
            self._written, self._bytes / 1e6, self.folder,
            f"; {self._left_out} left out because the disk was slower" if self._left_out else "",
        )  # fmt: skip

    def _fail(self) -> None:
        self._off = True
        if not self._failed:
            self._failed = True
            log.warning(
                "AttnScope: capture failed and is off for this run; sampling goes on",
                exc_info=True,
            )


def _file_name(info: CaptureInfo) -> str:
    layer = re.sub(r"[^\w.-]", "_", info.layer)
    return f"step{info.step:03d}.{layer}.call{info.call}{SUFFIX}"


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, and of its own memory even where the tensor was there already."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _unexpanded(mask: torch.Tensor) -> torch.Tensor:
    """A view without the dimensions that only repeat."""
    for dim in range(mask.ndim):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask
