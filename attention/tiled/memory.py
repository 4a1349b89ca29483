"""How much memory a call needs beside its input, at its peak."""

from __future__ import annotations

import torch

from ..taylor.kernel import accumulation_dtype
from ..token_layout import TokenLayout
from .cross import tiles_at_a_time
from .far import tiles_sharing
from .options import Options, picked_tiles, window_tiles
from .sizes import heads_at_a_time, sizes
from .tiles import SIDE, SLOTS, tile_count


def working_bytes(
    batch: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    layout: TokenLayout,
    options: Options,
    device: torch.device,
) -> int:
    """Peak of what a call allocates, in bytes, its output included and its input not.

    An estimate from shapes alone, before anything is allocated. The first-order terms, the tiles'
    tokens and the logits are most of it.

    Args:
        batch: B.
        heads: H.
        head_dim: D.
        value_dim: Dv.
        dtype: of query, key and value.
        layout: of the tokens.
        options: of the approximation.
        device: where it runs; how many heads are computed at a time depends on it.
    """
    size: int = accumulation_dtype(dtype).itemsize
    bounds, tiles = sizes(device), tile_count(layout)
    group = heads_at_a_time(heads, head_dim, value_dim, size, tiles, device)
    blocks = SLOTS // options.block
    exact = max((window_tiles(grid, options.radius) for grid in layout.grids), default=0)
    exact += picked_tiles(tiles, layout, options)
    columns = layout.text_tokens + exact * SLOTS + tiles * blocks

    # Query, key and value by tile, and the output where it doesn't take the queries' place.
    by_tile = tiles * SLOTS * (2 * head_dim + value_dim)
    if head_dim != value_dim:
        by_tile += tiles * SLOTS * value_dim
    gathered = tiles * SLOTS * max(head_dim, value_dim)
    text = layout.text_tokens * (head_dim + value_dim)
    cross = 0
    if options.first_order or options.top_k:
        step = tiles_at_a_time(tiles, size * group * head_dim * value_dim, device)
        cross = step * head_dim * (value_dim + SLOTS)
    terms = 0
    if options.first_order:
        # Those at the ends of what is held together may serve tiles beyond it too.
        most = max(bounds.terms // (size * group * head_dim * value_dim), 1) + 2
        terms = min(-(-tiles // tiles_sharing(layout)), most) * head_dim * value_dim
    # Logits, weights and masks between tiles, and pooled tiles.
    between = 5 * tiles * tiles * blocks + 2 * tiles * blocks * (head_dim + value_dim)
    row = SLOTS * columns
    run = min(tiles, max(1, bounds.logits // (size * group * row)))
    slides = device.type == "cpu" and group == 1
    if slides:
        run = min(run, max((-(-columns // SIDE) for _, columns in layout.grids), default=0))
    # Logits, weights where they have memory of their own, and near products on the way to them.
    parts = 2 if device.type == "cpu" else 3
    loop = run * (parts * row + SLOTS * (head_dim + 3 * value_dim))
    if not slides or options.top_k:
        loop += run * exact * SLOTS * (head_dim + value_dim)
    working = group * size * (by_tile + gathered + text + cross + terms + between + loop)
    return working + batch * heads * layout.tokens * value_dim * dtype.itemsize
