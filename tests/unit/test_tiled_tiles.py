"""How grids are cut into tiles, and which tiles lie near each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.attention.tiled.tiles import (
    SLOTS,
    TileGrid,
    cut,
    from_tiles,
    into_tiles,
    tile_count,
    windows,
)
from attnscope.attention.token_layout import TokenLayout

CPU = torch.device("cpu")
GRID = st.tuples(st.integers(1, 50), st.integers(1, 50))


@settings(max_examples=60, deadline=None)
@given(st.lists(GRID, min_size=1, max_size=3))
def test_every_token_has_one_slot_and_tiles_are_small_and_compact(
    grids: list[tuple[int, int]],
) -> None:
    layout = TokenLayout(0, tuple(grids))
    tiles = cut(layout, CPU)
    assert tiles.count == tile_count(layout)
    tokens = torch.arange(layout.image_tokens)
    assert torch.equal(tiles.order[tiles.slots], tokens)
    live = torch.arange(SLOTS) < tiles.live[:, None]
    assert torch.equal(tiles.order.view(-1, SLOTS)[live].sort().values, tokens)
    assert int(tiles.live.sum()) == layout.image_tokens and int(tiles.live.min()) >= 1
    assert tiles.full == bool(live.all())
    first = 0
    for (rows, columns), grid in zip(grids, tiles.grids, strict=True):
        own = tiles.order.view(-1, SLOTS)[grid.first : grid.last] - first
        y, x = own // columns, own % columns
        assert int(own.min()) >= 0 and int(own.max()) < rows * columns
        for place, size, count in ((y, rows, grid.rows), (x, columns, grid.columns)):
            extent = place.amax(dim=1) - place.amin(dim=1) + 1
            assert int(extent.max()) <= 8
            # As equal as can be: no slivers at an edge.
            assert int(extent.min()) >= size // count
        first += rows * columns


def test_quarters_of_a_whole_tile_stand_together() -> None:
    tiles = cut(TokenLayout(0, ((16, 24),)), CPU)
    own = tiles.order.view(-1, 4, 16)
    for block in (own // 24, own % 24):
        assert int((block.amax(dim=-1) - block.amin(dim=-1)).max()) == 3


@pytest.mark.parametrize("grids", [((16, 24),), ((17, 23),), ((8, 8), (16, 8)), ((8, 8), (5, 9))])
def test_into_tiles_and_back(grids: tuple[tuple[int, int], ...]) -> None:
    layout = TokenLayout(0, grids)
    tiles = cut(layout, CPU)
    image = torch.randn(2, layout.image_tokens, 3, generator=torch.Generator().manual_seed(0))
    slots = torch.empty(2, tiles.count, SLOTS, 3)
    into_tiles(tiles, image, slots, 2.0)
    torch.testing.assert_close(slots.flatten(1, 2), 2.0 * image[:, tiles.order])
    back = torch.empty_like(image)
    from_tiles(tiles, slots, back)
    torch.testing.assert_close(back, 2.0 * image)


def test_windows_are_squares_that_stay_inside() -> None:
    grid = TileGrid(first=10, rows=5, columns=4)
    found = windows(grid, 1, CPU)
    assert found.shape == (20, 9)
    for tile, near in enumerate(found.tolist()):
        assert tile + 10 in near and len(set(near)) == 9
        row, column = divmod(tile, 4)
        rows = sorted({(number - 10) // 4 for number in near})
        columns = sorted({(number - 10) % 4 for number in near})
        assert rows == list(range(min(max(row - 1, 0), 2), min(max(row - 1, 0), 2) + 3))
        start = min(max(column - 1, 0), 1)
        assert columns == list(range(start, start + 3))


def test_a_window_is_no_larger_than_its_grid() -> None:
    assert windows(TileGrid(0, 2, 7), 2, CPU).shape == (14, 10)
    assert windows(TileGrid(3, 1, 1), 5, CPU).tolist() == [[3]]
    assert windows(TileGrid(0, 3, 3), 0, CPU).tolist() == [[n] for n in range(9)]
