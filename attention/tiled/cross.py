"""How values go with keys within a tile, a few tiles at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .pool import Pooled
from .products import add_product, multiply
from .sizes import sizes
from .tiles import SLOTS, Tiles
from .workspace import Workspace


@dataclass(frozen=True, slots=True)
class Cross:
    """H of each tile about its blocks' means, as `pool` defines it; never of all tiles at once.

    All of them take as much memory as two copies of the tokens, and are needed once or twice.

    Attributes:
        key: ``[G, T, 64, D]``.
        value: ``[G, T, 64, Dv]``.
        mean: k̄ of each block, ``[G, T, blocks, 1, D]``.
        live: ``[T, 64, 1]``, 1 or 0; None where all slots are live.
        space: holds H and what becomes of it.
    """

    key: torch.Tensor
    value: torch.Tensor
    mean: torch.Tensor
    live: torch.Tensor | None
    space: Workspace

    @classmethod
    def of(
        cls,
        tiles: Tiles,
        key: torch.Tensor,
        value: torch.Tensor,
        pooled: Pooled,
        space: Workspace,
    ) -> Cross:
        heads, count, _, width = key.shape
        mean = pooled.key.view(heads, count, pooled.blocks, 1, width)
        live = None
        if not tiles.full:
            slot = torch.arange(SLOTS, device=key.device)
            live = (slot < tiles.live[:, None]).to(key.dtype).unsqueeze(-1)
        return cls(key, value, mean, live, space)

    def norm(self) -> torch.Tensor:
        """‖H‖ of each tile, ``[G, T]``."""
        return torch.cat([some.flatten(2).norm(dim=-1) for _, some in self._parts()], dim=1)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_b w_b·H_b, ``[G, t, D, Dv]`` for weights ``[G, t, T]``; the one before is lost."""
        width, value_width = self.key.shape[-1], self.value.shape[-1]
        summed = self.space.take("terms", (*weights.shape[:2], width * value_width))
        for some, products in self._parts():
            if some.start == 0:
                multiply(weights[:, :, some], products.flatten(2), out=summed)
            else:
                add_product(summed, weights[:, :, some], products.flatten(2))
        return summed.view(*weights.shape[:2], width, value_width)

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """H of some tiles, ``[G, n, D, Dv]``, and which they are."""
        heads, count, _, width = self.key.shape
        value_width = self.value.shape[-1]
        step = tiles_at_a_time(
            count, heads * self.key.element_size() * width * value_width, self.key.device
        )
        blocks = self.mean.shape[2]
        for first in range(0, count, step):
            some = slice(first, min(first + step, count))
            key, value = self.key[:, some], self.value[:, some]
            number = key.shape[1]
            offsets = self.space.take("offsets", key.shape)
            by_block = (heads, number, blocks, SLOTS // blocks, width)
            torch.sub(key.view(by_block), self.mean[:, some], out=offsets.view(by_block))
            if self.live is not None:
                offsets.mul_(self.live[some])
            products = self.space.take("cross", (heads, number, width, value_width))
            torch.bmm(
                offsets.flatten(0, 1).transpose(-2, -1),
                value.flatten(0, 1),
                out=products.flatten(0, 1),
            )
            yield some, products


def tiles_at_a_time(tiles: int, size: int, device: torch.device) -> int:
    """Of how many of so many tiles H is made at a time, in parts of about equal length.

    Args:
        tiles: T.
        size: bytes of one tile's H in all heads that are computed together.
        device: where.
    """
    most = max(1, sizes(device).cross // size)
    return math.ceil(tiles / math.ceil(tiles / most))
