"""How to approximate, and how many tiles that makes exact."""

from __future__ import annotations

from dataclasses import dataclass

from ..token_layout import TokenLayout
from .tiles import SLOTS, window_width


@dataclass(frozen=True, slots=True)
class Options:
    """How to approximate.

    Attributes:
        radius: of the window of exact tiles, in tiles; 0 is the query's own tile alone.
        top_k: further exact tiles of each query tile.
        first_order: whether values go with keys within a far tile.
        block: keys that one pseudo-key stands for: 64 or 16.
        correction: whether a pseudo-key's mass takes the spread of its keys into account.
    """

    radius: int = 1
    top_k: int = 0
    first_order: bool = True
    block: int = SLOTS
    correction: bool = True


def picked_tiles(tiles_: int, layout: TokenLayout, options: Options) -> int:
    """How many tiles a query tile can have beside its window: ``top_k`` or what is left."""
    most = max((window_tiles(grid, options.radius) for grid in layout.grids), default=0)
    return min(options.top_k, tiles_ - most)


def window_tiles(grid: tuple[int, int], radius: int) -> int:
    """Tiles of a window in a grid of so many rows and columns of tokens."""
    high, wide = (window_width(-(-size // 8), radius) for size in grid)
    return high * wide
