"""Tiles of 8×8 tokens: which token stands in which slot, and which tiles lie near each other.

A grid is cut into ⌈rows/8⌉ × ⌈columns/8⌉ tiles as equal as can be, so that a ragged edge leaves no
slivers. Every tile has 64 slots. Its live ones come first, quarter by quarter (4×4), so that 16
slots in a row are neighbours; dead ones repeat the tile's first token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..token_layout import TokenLayout

SIDE = 8
SLOTS = SIDE * SIDE


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Tiles of one grid, numbered row by row.

    Attributes:
        first: number of its first tile among the tiles of all grids.
        rows: of tiles.
        columns: of tiles.
    """

    first: int
    rows: int
    columns: int

    @property
    def last(self) -> int:
        """One past the number of its last tile."""
        return self.first + self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Tiles:
    """All tiles of a sequence, T of them.

    Attributes:
        grids: in order.
        order: ``[64·T]`` int64: the image token of each slot, counted from the first one.
        slots: ``[image tokens]`` int64: the slot of each image token.
        live: ``[T]`` int64: live slots of each tile, which come first.
        full: whether no slot is dead.
    """

    grids: tuple[TileGrid, ...]
    order: torch.Tensor
    slots: torch.Tensor
    live: torch.Tensor
    full: bool

    @property
    def count(self) -> int:
        """T."""
        return self.grids[-1].last if self.grids else 0


def into_tiles(tiles: Tiles, image: torch.Tensor, out: torch.Tensor, factor: float = 1.0) -> None:
    """Put image tokens into the slots of their tiles.

    Args:
        tiles: of the grids.
        image: ``[G, image tokens, W]``; any strides, any floating dtype.
        out: ``[G, T, 64, W]``, filled with the tokens times the factor.
        factor: on every value.
    """
    if not tiles.full:
        torch.mul(image.index_select(1, tiles.order).view(out.shape), factor, out=out)
        return
    for target, source in zip(_quarters(tiles, out), _places(tiles, image), strict=True):
        torch.mul(source, factor, out=target)


def from_tiles(tiles: Tiles, slots: torch.Tensor, image: torch.Tensor) -> None:
    """The way back: fill ``image`` ``[G, image tokens, W]`` from ``slots`` ``[G, T, 64, W]``."""
    if not tiles.full:
        image.copy_(slots.flatten(1, 2).index_select(1, tiles.slots))
        return
    for source, target in zip(_quarters(tiles, slots), _places(tiles, image), strict=True):
        target.copy_(source)


def _quarters(tiles: Tiles, slots: torch.Tensor) -> list[torch.Tensor]:
    """Each grid's slots, ``[G, rows, columns, 2, 2, 4, 4, W]``: quarters and places in them."""
    half, (heads, _, _, width) = SIDE // 2, slots.shape
    return [
        slots[:, grid.first : grid.last].view(
            heads, grid.rows, grid.columns, 2, 2, half, half, width
        )
        for grid in tiles.grids
    ]


def _places(tiles: Tiles, image: torch.Tensor) -> list[torch.Tensor]:
    """The same of tokens in raster order, as views."""
    half, (heads, _, width) = SIDE // 2, image.shape
    return [
        image[:, grid.first * SLOTS : grid.last * SLOTS]
        .view(heads, grid.rows, 2, half, grid.columns, 2, half, width)
        .permute(0, 1, 4, 2, 5, 3, 6, 7)
        for grid in tiles.grids
    ]


def tile_count(layout: TokenLayout) -> int:
    """How many tiles a layout has."""
    return sum(-(-rows // SIDE) * -(-columns // SIDE) for rows, columns in layout.grids)


@lru_cache(maxsize=32)
def cut(layout: TokenLayout, device: torch.device) -> Tiles:
    """Cut the grids of a layout into tiles.

    Args:
        layout: of the sequence.
        device: of the tensors, which are kept: copying them at each call would make a GPU wait.
    """
    # Calls can come under inference mode; a cached tensor must be usable outside it too.
    with torch.inference_mode(False):
        grids: list[TileGrid] = []
        slots: list[torch.Tensor] = []
        for rows, columns in layout.grids:
            first = grids[-1].last if grids else 0
            grid = TileGrid(first, -(-rows // SIDE), -(-columns // SIDE))
            slots.append(_slots(rows, columns, grid))
            grids.append(grid)
        slot = torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)
        count = tile_count(layout)
        live = torch.bincount(slot // SLOTS, minlength=count)
        order = torch.empty(count * SLOTS, dtype=torch.int64)
        tokens = torch.arange(len(slot))
        order[slot] = tokens
        # The first slot of a tile is always live.
        dead = torch.arange(SLOTS) >= live[:, None]
        by_tile = order.view(count, SLOTS)
        order = torch.where(dead, by_tile[:, :1], by_tile).flatten()
        return Tiles(
            tuple(grids), order.to(device), slot.to(device), live.to(device), not bool(dead.any())
        )


def _slots(rows: int, columns: int, grid: TileGrid) -> torch.Tensor:
    """Slot of each token of one grid in raster order, ``[rows·columns]``."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    # Tile i begins at ⌊i·rows / tiles⌋, which this turns round.
    tile_y = ((y + 1) * grid.rows - 1) // rows
    tile_x = ((x + 1) * grid.columns - 1) // columns
    inner_y, inner_x = y - tile_y * rows // grid.rows, x - tile_x * columns // grid.columns
    half = SIDE // 2
    quarter = (inner_y // half) * 2 + inner_x // half
    place = (quarter * half + inner_y % half) * half + inner_x % half
    tile = (grid.first + tile_y * grid.columns + tile_x).flatten()
    by_place = torch.argsort(tile * SLOTS + place.flatten())
    counts = torch.bincount(tile - grid.first)
    starts = counts.cumsum(0) - counts
    sorted_tile = tile[by_place]
    rank = torch.arange(len(tile)) - starts[sorted_tile - grid.first]
    slots = torch.empty_like(tile)
    slots[by_place] = sorted_tile * SLOTS + rank
    return slots


@lru_cache(maxsize=32)
def windows(grid: TileGrid, radius: int, device: torch.device) -> torch.Tensor:
    """The tiles near each tile of a grid.

    The window is a square of 2·radius + 1 tiles, moved to lie inside the grid, so that tiles at
    an edge have as many neighbours as others.

    Args:
        grid: whose tiles.
        radius: in tiles.
        device: of the answer, which is kept.

    Returns:
        ``[tiles of the grid, W]`` int64, numbers among all tiles, column by column of the window.
    """
    with torch.inference_mode(False):
        rows = _near(grid.rows, radius)
        columns = _near(grid.columns, radius)
        numbers = rows[:, None, None, :] * grid.columns + columns[None, :, :, None]
        return (grid.first + numbers.reshape(grid.rows * grid.columns, -1)).to(device)


def window_start(place: int, size: int, radius: int) -> int:
    """First of the neighbours of a place on a line of ``size`` tiles."""
    return max(0, min(place - radius, size - window_width(size, radius)))


def window_width(size: int, radius: int) -> int:
    """How many neighbours a place has on a line of ``size`` tiles, itself included."""
    return min(size, 2 * radius + 1)


def _near(size: int, radius: int) -> torch.Tensor:
    starts = torch.tensor([window_start(place, size, radius) for place in range(size)])
    return starts[:, None] + torch.arange(window_width(size, radius))
