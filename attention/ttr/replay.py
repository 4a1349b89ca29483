"""Earlier calls to return to: on the host, in half precision, bounded over all layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..token_layout import TokenLayout
from .student import Rows, Target

LEAST_TURNS = 8
"""Calls of its own layer that a kept call shall live through, on average."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptCall:
    """Some queries of a call, with what the teacher made of them, and all its keys and values.

    Attributes:
        query: ``[B, H, S, D]``.
        index: ``[S]`` int64.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, D]``.
        out: ``[B, H, S, D]``.
        log_mass: ``[B, H, S]`` float32.
        scale: factor on q·k.
        layout: of the tokens.
    """

    query: torch.Tensor
    index: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    log_mass: torch.Tensor
    scale: float
    layout: TokenLayout | None

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.query, self.index, self.key, self.value, self.out, self.log_mass)

    @property
    def held_bytes(self) -> int:
        """Memory of the tensors, as the host's allocator hands it out."""
        return sum(_block_bytes(tensor) for tensor in self._tensors())

    def to_host(self) -> KeptCall:
        """The same in half precision on the host.

        From a GPU the copy goes to pinned memory and is not waited for: whatever reads it again
        is a copy to the same device behind it in the same stream.
        """
        half = torch.float16 if self.query.dtype == torch.float16 else torch.bfloat16
        return KeptCall(
            _host(self.query, half),
            _host(self.index, self.index.dtype),
            _host(self.key, half),
            _host(self.value, half),
            _host(self.out, half),
            _host(self.log_mass, torch.float32),
            self.scale,
            self.layout,
        )

    def lesson(self, chosen: torch.Tensor, device: torch.device) -> tuple[Rows, Target]:
        """Some of the queries, in float32 on a device, in memory of their own.

        Args:
            chosen: ``[S']`` int64 on the CPU, which of the S queries.
            device: where the student is.
        """
        there = chosen.to(self.query.device, non_blocking=True)

        def part(tensor: torch.Tensor) -> torch.Tensor:
            return _float32(tensor.index_select(2, there), device)

        rows = Rows(
            part(self.query),
            self.index.index_select(0, there).to(device, non_blocking=True),
            _float32(self.key, device),
            _float32(self.value, device),
            self.scale,
            self.layout,
        )
        return rows, Target(part(self.out), part(self.log_mass))


def _float32(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True).to(torch.float32)


def _host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of its own memory, even where the tensor is on the host in that dtype."""
    pinned = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=dtype, pin_memory=pinned)
    return copy.copy_(tensor.to(dtype), non_blocking=pinned)


def _block_bytes(tensor: torch.Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    # torch hands out pinned memory in powers of two.
    return 1 << max(0, size - 1).bit_length() if tensor.is_pinned() else size


class Replay:
    """Kept calls of all layers within one bound, the oldest evicted first."""

    def __init__(self, limit_bytes: int, generator: torch.Generator) -> None:
        """
        Args:
            limit_bytes: of all kept calls.
            generator: on the CPU, of all that is drawn.
        """
        self.limit_bytes = limit_bytes
        self.total_bytes = 0
        self._generator = generator
        self._order: deque[tuple[str, KeptCall, int]] = deque()
        self._layers: dict[str, list[KeptCall]] = {}
        self._bytes: dict[str, int] = {}
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(self._order)

    def held_bytes(self, layer: str) -> int:
        """Of a layer's kept calls."""
        return self._bytes.get(layer, 0)

    def admits(self, layer: str, size: int) -> bool:
        """Whether a call shall be kept; draws a number once old calls would have to go.

        Where the bound holds less than `LEAST_TURNS` rounds of all layers, to keep every call
        would evict each before its layer's next turn: copies for nothing. Then only so many are
        kept that each lives through that many turns.

        Args:
            layer: that calls.
            size: bytes of the call, about.
        """
        self._seen.add(layer)
        if size > self.limit_bytes:
            return False
        if self.total_bytes + size <= self.limit_bytes:
            return True
        rounds = self.limit_bytes / max(1, size) / len(self._seen)
        if rounds >= LEAST_TURNS:
            return True
        return float(torch.rand((), generator=self._generator)) < rounds / LEAST_TURNS

    def add(self, layer: str, call: KeptCall) -> None:
        """Keep a call; what is oldest goes. One larger than the bound is not kept."""
        size = call.held_bytes
        if size > self.limit_bytes:
            return
        while self.total_bytes + size > self.limit_bytes:
            self._forget(*self._order.popleft())
        self._order.append((layer, call, size))
        self._layers.setdefault(layer, []).append(call)
        self._bytes[layer] = self._bytes.get(layer, 0) + size
        self.total_bytes += size

    def draw(self, layer: str) -> KeptCall | None:
        """One of a layer's kept calls at random; None where there is none."""
        calls = self._layers.get(layer)
        if not calls:
            return None
        return calls[int(torch.randint(len(calls), (), generator=self._generator))]

    def discard(self, call: KeptCall) -> None:
        """Keep a call no longer, if it still is kept."""
        for place, entry in enumerate(self._order):
            if entry[1] is call:
                del self._order[place]
                self._forget(*entry)
                return

    def clear(self) -> None:
        """Keep nothing; hands pinned memory back to the system."""
        pinned = any(entry[1].key.is_pinned() for entry in self._order)
        self._order.clear()
        self._layers.clear()
        self._bytes.clear()
        self._seen.clear()
        self.total_bytes = 0
        empty = getattr(torch._C, "_host_emptyCache", None)
        if pinned and empty is not None:
            empty()

    def _forget(self, layer: str, call: KeptCall, size: int) -> None:
        self._layers[layer].remove(call)
        self._bytes[layer] -= size
        self.total_bytes -= size
