"""Query and key before rotary embedding: Flux's ``attention``, patched while models of ours run.

ComfyUI's Flux rotates query and key inside ``comfy.ldm.flux.math.attention``, which
``comfy.ldm.flux.layers`` binds by name too, so both bindings are replaced when a model is about
to run and put back when it has run. What stands there meanwhile only remembers query and key for
the length of the call and calls what stood there before; the attention override, which is reached
from within, does all the rest. It remembers for samplings of ours alone: they carry a `PreRope` in
their ``transformer_options``, and a call without one goes straight through.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .layouts import AttentionCall

log = logging.getLogger("attnscope")

OPTION = "attnscope_pre_rope"
"""Where a sampling's `PreRope` stands in its ``transformer_options``."""

MODULES = ("comfy.ldm.flux.math", "comfy.ldm.flux.layers")
NAME = "attention"

_POSITIONS = ("q", "k", "v", "pe", "mask", "transformer_options")


@dataclass(slots=True)
class _Held:
    query: torch.Tensor
    key: torch.Tensor
    rotated: bool


class PreRope:
    """What the attention calls of one sampling had before rotary embedding, per thread."""

    def __init__(self) -> None:
        self._threads = threading.local()
        self._copies = False

    def __deepcopy__(self, memo: Any) -> PreRope:
        # Options may be copied; the sampling is the same.
        return self

    @contextlib.contextmanager
    def holding(self, query: Any, key: Any, rotated: bool) -> Iterator[None]:
        """Remember query and key while a call runs.

        Args:
            query: a tensor, or ComfyUI's container of one, which stays unconsumed.
            key: likewise.
            rotated: whether the call is going to rotate them.
        """
        query, key = _peek(query), _peek(key)
        held = None
        if isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor):
            if rotated and self._copies:
                query, key = query.clone(), key.clone()
            held = _Held(query, key, rotated)
        before = getattr(self._threads, "held", None)
        self._threads.held = held
        try:
            yield
        finally:
            self._threads.held = before

    def of(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Query and key of a call before rotation; None where they are not to be had.

        Where rotation turns out to have been done in place, what was remembered is overwritten:
        the call has none, and later ones get copies.
        """
        held: _Held | None = getattr(self._threads, "held", None)
        if held is None:
            return None
        pairs = ((held.query, call.query), (held.key, call.key))
        if any(before.shape != after.shape for before, after in pairs):
            return None
        if held.rotated and any(_same_memory(before, after) for before, after in pairs):
            self._copies = True
            return None
        return held.query, held.key


def _peek(value: Any) -> Any:
    """The tensor in a container, without taking it out."""
    peek = getattr(value, "peek", None)
    return peek() if callable(peek) else value


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def unfamiliar(function: Any) -> str:
    """Why a binding can't be what we know as Flux's attention; empty where it can."""
    if not callable(function):
        return "is not a function"
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return "has no signature"
    kinds = {parameter.kind for parameter in parameters}
    names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    if inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.VAR_KEYWORD in kinds:
        # Another patch that hands on whatever it gets.
        return ""
    if tuple(names[:4]) != _POSITIONS[:4]:
        return f"begins with ({', '.join(names[:4])}), not ({', '.join(_POSITIONS[:4])})"
    if "transformer_options" not in names and inspect.Parameter.VAR_KEYWORD not in kinds:
        return "takes no transformer_options"
    return ""


class _Wrapper:
    """What stands in for one function."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.active = True

        @functools.wraps(original)
        def attention(*args: Any, **kwargs: Any) -> Any:
            carrier = None
            if self.active and not torch.compiler.is_compiling():
                options = _argument("transformer_options", args, kwargs)
                carrier = options.get(OPTION) if isinstance(options, Mapping) else None
            if not isinstance(carrier, PreRope):
                return original(*args, **kwargs)
            query, key = (_argument(name, args, kwargs) for name in ("q", "k"))
            rotated = _argument("pe", args, kwargs) is not None
            with carrier.holding(query, key, rotated):
                return original(*args, **kwargs)

        self.function = attention


@dataclass(frozen=True, slots=True)
class _Binding:
    """What we put into one module. Bindings of one function share a wrapper, as they shared it."""

    module: ModuleType
    wrapper: _Wrapper

    def put_back(self) -> bool:
        """Our function out; whether what was there before is there again.

        Where somebody has put theirs over it, it stays: theirs is not ours to take. What lies
        under another patch then only hands on.
        """
        self.wrapper.active = False
        if getattr(self.module, NAME, None) is self.wrapper.function:
            setattr(self.module, NAME, self.wrapper.original)
        return getattr(self.module, NAME, None) is self.wrapper.original


def _argument(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if name in kwargs:
        return kwargs[name]
    index = _POSITIONS.index(name)
    return args[index] if index < len(args) else None


class FluxPatch:
    """The patch of this process, in place while any model that wants it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._bindings: list[_Binding] = []
        self._covered: list[_Binding] = []
        self._declined: set[str] = set()

    def pre_run(self, patcher: Any) -> None:
        """ON_PRE_RUN callback of a model. Never raises."""
        try:
            with self._lock:
                self._users[patcher] = self._users.get(patcher, 0) + 1
                if not self._bindings:
                    self._install()
        except Exception:
            log.exception("AttnScope: Flux's attention was not patched; calls run exact")

    def cleanup(self, patcher: Any) -> None:
        """ON_CLEANUP callback of a model; may come more often than `pre_run`. Never raises."""
        try:
            with self._lock:
                left = self._users.get(patcher, 0) - 1
                if left > 0:
                    self._users[patcher] = left
                else:
                    self._users.pop(patcher, None)
                if not self._users:
                    self._remove()
        except Exception:
            log.exception("AttnScope: Flux's attention was not put back")

    def _install(self) -> None:
        self._uncover()
        modules = [importlib.import_module(name) for name in MODULES]
        for module in modules:
            reason = unfamiliar(getattr(module, NAME, None))
            if reason:
                self._decline(f"{module.__name__}.{NAME} {reason}")
                return
        wrappers: dict[int, _Wrapper] = {}
        for module in modules:
            original = getattr(module, NAME)
            wrapper = wrappers.setdefault(id(original), _Wrapper(original))
            setattr(module, NAME, wrapper.function)
            self._bindings.append(_Binding(module, wrapper))

    def _remove(self) -> None:
        self._covered += self._bindings
        self._bindings = []
        self._uncover()

    def _uncover(self) -> None:
        """Take out what is ours, also what lay under another patch that has gone since."""
        # The newest first: an older one may lie under it.
        self._covered = [b for b in reversed(self._covered) if not b.put_back()][::-1]

    def _decline(self, why: str) -> None:
        if why not in self._declined:
            self._declined.add(why)
            log.warning(
                "AttnScope: %s. This ComfyUI, or another node, has another attention than the one "
                "that AttnScope knows how to patch; variants that need query and key before "
                "rotary embedding run exact", why,
            )  # fmt: skip


FLUX_PATCH = FluxPatch()
"""The process's one patch."""


def register(model: Any, key: str, wanted: bool) -> None:
    """Let a model patch Flux for its runs, or no longer.

    Args:
        model: a clone of ours of ComfyUI's MODEL.
        key: under which our callbacks stand.
        wanted: False only takes out what an earlier node of ours has registered.
    """
    from comfy.patcher_extension import CallbacksMP

    for kind, callback in (
        (CallbacksMP.ON_PRE_RUN, FLUX_PATCH.pre_run),
        (CallbacksMP.ON_CLEANUP, FLUX_PATCH.cleanup),
    ):
        model.remove_callbacks_with_key(kind, key)
        if wanted:
            model.add_callback_with_key(kind, key, callback)
