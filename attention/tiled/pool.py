"""What is known of a tile as a whole: means, spread, and how values go with keys.

Keys are pooled over blocks of ``centroid_size`` slots, M of them: a tile, or its quarters. With n
live keys kⱼ of mean k̄ and values vⱼ of mean v̄, a block stands for

``Σⱼ e^{q·kⱼ}     ≈ n·e^{q·k̄}·e^{c'}``, where c = ½·qᵀΣq and Σ is the keys' covariance, and
``Σⱼ e^{q·kⱼ}·vⱼ ≈ n·e^{q·k̄}·e^{c'}·(v̄ + qᵀH/n)``, where ``H = Σⱼ (kⱼ - k̄)·vⱼᵀ``.

Both are exact to the order in which they are cut, and for keys and values that are jointly normal
to all orders. Σ is taken as s·Σ̄ with one matrix Σ̄, the mean over the blocks of a head, and one
number s = ⟨Σ, Σ̄⟩ / ⟨Σ̄, Σ̄⟩ per block: its best multiple. ½·qᵀΣ̄q is taken as its mean over a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .products import multiply
from .tiles import SLOTS, Tiles

_SAMPLE = 5
"""Every fifth slot serves to estimate covariances: 13 of a tile, no two columns alike."""


def sampled_slots(block: int) -> torch.Tensor:
    """The slots of a tile whose keys serve to estimate covariances, int64."""
    return torch.arange(0, SLOTS, _SAMPLE if block == SLOTS else 1)


@dataclass(frozen=True, slots=True)
class Pooled:
    """Tiles pooled, of G heads.

    Attributes:
        query: ``[G, T, D]``, mean query of each tile.
        key: ``[G, M, D]``, k̄ of each block.
        value: ``[G, M, Dv]``, v̄ of each block.
        log_count: ``[M]``, log n; -inf where a block has no live slot.
        own: ``[G, T]``, mean of ½·qᵀΣ̄q over each tile's queries; None without a correction.
        share: ``[G, M]``, s of each block; None likewise.
        blocks: blocks of a tile.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    log_count: torch.Tensor
    own: torch.Tensor | None
    share: torch.Tensor | None
    blocks: int


def pool(
    tiles: Tiles,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block: int,
    spread: bool,
) -> Pooled:
    """Pool the tiles of some heads.

    Args:
        tiles: T of them.
        query: ``[G, T, 64, D]``, the scale already in it.
        key: ``[G, T, 64, D]``.
        value: ``[G, T, 64, Dv]``.
        block: slots of a block, 64 or 16.
        spread: whether to estimate Σ̄, s and what the queries make of them.
    """
    heads, count, _, width = key.shape
    blocks = SLOTS // block
    slot = torch.arange(SLOTS, device=key.device)
    live = (slot < tiles.live[:, None]).to(key.dtype).unsqueeze(-1)  # [T, 64, 1]
    held = live.view(count * blocks, block, 1).sum(dim=1)  # [M, 1]
    least = held.clamp_min(1.0)

    def mean(x: torch.Tensor) -> torch.Tensor:
        by_block = x.reshape(heads, count * blocks, block, x.shape[-1])
        if tiles.full:
            return by_block.mean(dim=2)
        return (by_block * live.view(count * blocks, block, 1)).sum(dim=2) / least

    key_mean = mean(key)
    share = own = None
    if spread:
        matrix, share = _spread(key, key_mean, live, block)
        some = query[:, :, ::_SAMPLE].reshape(heads, -1, width)
        squared = multiply(some, matrix).mul_(some).sum(dim=-1)
        own = squared.view(heads, count, -1).mean(dim=-1).mul_(0.5)
    queries = query.mean(dim=2)
    if not tiles.full:
        queries = (query * live).sum(dim=2) / live.sum(dim=1)
    return Pooled(
        query=queries,
        key=key_mean,
        value=mean(value),
        log_count=held.squeeze(-1).log(),
        own=own,
        share=share,
        blocks=blocks,
    )


def _spread(
    key: torch.Tensor, mean: torch.Tensor, live: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ̄ ``[G, D, D]`` and s ``[G, M]`` of keys ``[G, T, 64, D]`` about their means."""
    heads, count, _, width = key.shape
    blocks = SLOTS // block
    by_block = key.view(heads, count * blocks, block, width)
    alive = live.view(count * blocks, block)
    if block == SLOTS:
        by_block, alive = by_block[:, :, ::_SAMPLE], alive[:, ::_SAMPLE]
    offsets = (by_block - mean.unsqueeze(2)).mul_(alive.unsqueeze(-1))
    some = offsets.view(heads, -1, width)
    held = alive.sum()
    matrix = multiply(some.transpose(-2, -1), some) / held
    quadratic = (multiply(some, matrix) * some).sum(dim=-1).view(heads, count * blocks, -1)
    own = quadratic.sum(dim=-1) / alive.sum(dim=-1).clamp_min(1.0)
    norm = matrix.square().sum(dim=(-2, -1)).unsqueeze(-1)
    # Tiles of one token, or of equal keys, have no spread at all.
    return matrix, own / norm.clamp_min(torch.finfo(norm.dtype).tiny)
