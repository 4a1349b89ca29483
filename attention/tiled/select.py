"""Which tiles a query tile attends to exactly, beside those of its window."""

from __future__ import annotations

import torch

from .tiles import SLOTS, Tiles, windows


def excluded_windows(tiles: Tiles, radius: int, dtype: torch.dtype) -> torch.Tensor:
    """``[T, T]``: -inf where the column's tile lies in the row's window, 0 elsewhere."""
    device = tiles.live.device
    excluded = torch.zeros(tiles.count, tiles.count, dtype=dtype, device=device)
    for grid in tiles.grids:
        excluded[grid.first : grid.last].scatter_(1, windows(grid, radius, device), float("-inf"))
    return excluded


def pick(
    logits: torch.Tensor, norm: torch.Tensor, excluded: torch.Tensor, count: int
) -> torch.Tensor:
    """The tiles that would be missed most if they were approximated.

    A tile's score is the log of its mass as the tile's mean query sees it, plus log‖H‖:
    how much there is to get wrong.

    Args:
        logits: of each tile's mean query with each block, its mass in it, ``[G, T, M]``.
        norm: ‖H‖ of each tile, ``[G, T]``.
        excluded: of `excluded_windows`.
        count: how many to pick; each tile has as many left.

    Returns:
        ``[G, T, count]`` int64.
    """
    heads, total, _ = logits.shape
    score = logits.view(heads, total, total, -1).logsumexp(dim=-1)
    # A tile of one token has no first-order term, and no error either.
    norm = norm.log().clamp_min(-SLOTS)
    score = score + norm.unsqueeze(1) + excluded
    picked: torch.Tensor = score.topk(count, dim=-1, sorted=False).indices
    return picked
