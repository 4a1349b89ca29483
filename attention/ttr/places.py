"""Which keys a query sees exactly: the text, and the tiles of its window."""

from __future__ import annotations

import torch

from ..tiled.options import window_tiles
from ..tiled.select import excluded_windows
from ..tiled.tiles import SLOTS, cut, tile_count
from ..token_layout import TokenLayout


def has_far(layout: TokenLayout, radius: int) -> bool:
    """Whether any image token lies outside a window: then one does for every image query."""
    return tile_count(layout) > window_tiles(layout.grids[0], radius)


def near_keys(index: torch.Tensor, layout: TokenLayout, radius: int) -> torch.Tensor:
    """The keys that some queries see exactly.

    Args:
        index: ``[S]`` int64, places of the queries in the sequence.
        layout: of the N tokens.
        radius: of the window, in tiles.

    Returns:
        ``[S, N]`` bool. Text queries see every key, and every query the text.
    """
    tiles, text = cut(layout, index.device), layout.text_tokens
    of_token = tiles.slots // SLOTS
    window = excluded_windows(tiles, radius, torch.float32) < 0
    own = of_token[(index - text).clamp_min(0)]
    image = window[own].index_select(1, of_token) | (index < text).unsqueeze(-1)
    return torch.cat([image.new_ones(len(index), text), image], dim=1)
