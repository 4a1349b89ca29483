"""Keys and values near a run of query tiles, laid out for products of batches of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .tiles import SLOTS, TileGrid, window_start, window_width
from .workspace import Workspace


@dataclass(frozen=True, slots=True)
class Run:
    """Query tiles that are computed together, all of one grid and, on a CPU, of one row of it.

    Attributes:
        grid: theirs.
        first: number of the first of them among all tiles.
        last: one past the number of the last.
    """

    grid: TileGrid
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Batch:
    """Query tiles ``first`` to ``last`` of a run, in b equal parts, and the keys of each part.

    Attributes:
        first: counted from the run's first tile.
        last: one past the last.
        key: ``[b, keys, D]``; parts may overlap in memory.
        value: ``[b, keys, Dv]``.
    """

    first: int
    last: int
    key: torch.Tensor
    value: torch.Tensor


def runs(grids: tuple[TileGrid, ...], most: int, by_row: bool) -> Iterator[Run]:
    """All query tiles in runs of about equal length.

    Args:
        grids: of the tiles.
        most: tiles of a run, at least 1.
        by_row: whether no run may go over the end of a row of tiles.
    """
    for grid in grids:
        length = grid.columns if by_row else grid.last - grid.first
        parts = -(-length // most)
        for start in range(grid.first, grid.last, length):
            for part in range(parts):
                first, last = (start + length * end // parts for end in (part, part + 1))
                yield Run(grid, first, last)


def gathered(key: torch.Tensor, value: torch.Tensor, numbers: torch.Tensor) -> Batch:
    """Chosen tiles of each query tile, copied together.

    Args:
        key: ``[G, T, 64, D]``.
        value: ``[G, T, 64, Dv]``.
        numbers: ``[G or 1, t, W]`` int64: of the tiles, for each head and query tile.

    Returns:
        One batch of G·t parts of 64·W keys.
    """
    heads, count = key.shape[:2]
    offsets = torch.arange(0, heads * count, count, device=key.device).view(heads, 1, 1)
    flat = (numbers + offsets).flatten()
    parts = heads * numbers.shape[1]

    def chosen(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        picked = x.view(heads * count, SLOTS * width)[flat]
        return picked.view(parts, numbers.shape[2] * SLOTS, width)

    return Batch(0, numbers.shape[1], chosen(key), chosen(value))


def sliding(
    key: torch.Tensor, value: torch.Tensor, run: Run, radius: int, space: Workspace
) -> Iterator[Batch]:
    """The windows of query tiles in one row of tiles, without a copy of each window.

    Rows of tiles that the windows reach are laid side by side, so that a column of a window is
    one piece of memory and neighbouring windows overlap. Tiles at an edge share their window.

    Args:
        key: ``[1, T, 64, D]``.
        value: ``[1, T, 64, Dv]``.
        run: within a row of tiles.
        radius: of the windows.
        space: holds the rows of tiles, until the next run's.
    """
    grid = run.grid
    row, begin = divmod(run.first - grid.first, grid.columns)
    end = begin + run.count
    high, wide = window_width(grid.rows, radius), window_width(grid.columns, radius)
    top = window_start(row, grid.rows, radius)
    left = window_start(begin, grid.columns, radius)
    right = window_start(end - 1, grid.columns, radius) + wide

    def side_by_side(name: str, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        own = x[0, grid.first : grid.last].view(grid.rows, grid.columns, SLOTS, width)
        band = space.take(name, (right - left, high, SLOTS, width))
        band.copy_(own[top : top + high, left:right].transpose(0, 1))
        column = high * SLOTS * width
        return band.as_strided(
            (right - left - wide + 1, wide * high * SLOTS, width), (column, width, 1)
        )

    keys, values = side_by_side("near key", key), side_by_side("near value", value)
    starts = [window_start(place, grid.columns, radius) - left for place in range(begin, end)]
    place = 0
    while place < len(starts):
        same = starts.count(starts[place])
        stop = place + same
        if same == 1:
            while stop < len(starts) and starts.count(starts[stop]) == 1:
                stop += 1
        windows = slice(starts[place], starts[stop - 1] + 1)
        yield Batch(place, stop, keys[windows], values[windows])
        place = stop
