"""The runtimes of this process: one run at a time has one, and few are kept between runs.

What is kept is on the host and bounded; what isn't comes back from its checkpoint. A runtime whose
checkpoint could not be written is kept before others, since memory is all it has.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..variant import ModelPrint
from .runtime import Runtime
from .student import StudentOptions

log = logging.getLogger("attnscope")

KEPT_BYTES = 512 * 2**20
"""Of students and moments between runs. The largest Flux's take as much and more."""

KEPT_UNSAVED = 4
"""Runtimes kept although they don't fit, because their checkpoint could not be written."""

_REMEMBERED = 256

Key = tuple[Path | None, StudentOptions, str]


@dataclass(frozen=True, slots=True)
class Taken:
    """A runtime for a run.

    Attributes:
        runtime: that no other run uses.
        loaded: whether it was read from its checkpoint now.
        recovered: whether this process had it before and has kept nothing of it.
        shared: whether another run is using the same students: this is a copy, which must
            neither be trained nor written.
    """

    runtime: Runtime
    loaded: bool
    recovered: bool
    shared: bool


class Pool:
    """Hands runtimes out and takes them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Key, Runtime] = {}
        self._out: dict[Key, Runtime] = {}
        self._known: dict[Key, None] = {}

    def take(
        self,
        path: Path | None,
        options: StudentOptions,
        seed: int,
        model: ModelPrint,
        load: Callable[[Runtime], bool],
    ) -> Taken:
        """A runtime for a run, to be given back.

        Args:
            path: of the checkpoint.
            options: see `Runtime`.
            seed: see `Runtime`.
            model: that is sampled.
            load: reads the checkpoint into a runtime; whether there was one.

        Raises:
            CheckpointError: there is a checkpoint that can't be used.
        """
        key = (path, options, model.weights)
        fresh = Runtime(path, options, seed, model)
        with self._lock:
            shared = key in self._out
            if not shared:
                # Taken first, so that a second run finds it taken while this one reads.
                self._out[key] = fresh
                kept = self._kept.pop(key, None)
                known = key in self._known
                self._remember(key)
        if shared:
            return Taken(fresh, load(fresh), recovered=False, shared=True)
        try:
            if kept is not None and (kept.unsaved or not kept.stale):
                with self._lock:
                    self._out[key] = kept
                return Taken(kept, loaded=False, recovered=False, shared=False)
            return Taken(fresh, load(fresh), recovered=known, shared=False)
        except BaseException:
            with self._lock:
                del self._out[key]
            raise

    def give_back(self, runtime: Runtime) -> None:
        """Take a runtime back from a run that is over; it has left the device."""
        with self._lock:
            key = next((k for k, one in self._out.items() if one is runtime), None)
            if key is None:
                return
            del self._out[key]
            if runtime.layers:
                self._kept[key] = runtime
            self._bound()

    def _remember(self, key: Key) -> None:
        self._known.pop(key, None)
        self._known[key] = None
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]

    def _bound(self) -> None:
        """Drop what doesn't fit, oldest first; unsaved ones only when there are too many."""
        held = sum(one.held_bytes for one in self._kept.values())
        for key, one in list(self._kept.items()):
            if held <= KEPT_BYTES:
                break
            if not one.unsaved:
                held -= one.held_bytes
                del self._kept[key]
        unsaved = [key for key, one in self._kept.items() if one.unsaved]
        for key in unsaved[: max(0, len(unsaved) - KEPT_UNSAVED)]:
            log.warning(
                "AttnScope: students that %s could not be written to are dropped: %d updates",
                key[0], self._kept[key].unsaved,
            )  # fmt: skip
            del self._kept[key]


POOL = Pool()
"""The process's own."""
