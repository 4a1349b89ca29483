"""How much memory the residual student needs, and how much it takes at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..quality import accumulates
from ..taylor.kernel import accumulation_dtype
from ..tiled.options import window_tiles
from ..tiled.sizes import heads_at_a_time, sizes
from ..tiled.tiles import SIDE, SLOTS, tile_count
from ..token_layout import TokenLayout
from .places import has_far
from .student import StudentOptions

_TRAINING_BYTES = 1024 * 2**20
"""Of a part of an update; more heads at a time than that allows would be no faster."""


def training_heads(options: StudentOptions, keys: int, chunk: int) -> int:
    """How many heads of an update are computed at a time.

    Args:
        options: of the student.
        keys: N.
        chunk: queries of a part.
    """
    most = max(1, _TRAINING_BYTES // _head_bytes(options, keys, chunk))
    groups = -(-options.heads // most)
    return -(-options.heads // groups)


def _head_bytes(options: StudentOptions, keys: int, chunk: int) -> int:
    """Of one head and ``chunk`` queries, forward and backward."""
    # Of the keys: centred and scaled, their projections and features, and the gradients of these.
    of_keys = 3 * options.head_dim + 3.5 * options.features
    # Of the pairs: near logits and their mask, or the kernel and its gradient.
    return int(4 * keys * (of_keys + 3 * chunk))


def training_bytes(
    options: StudentOptions, query_shape: Sequence[int], queries: int, chunk: int
) -> int:
    """`Student.training_bytes` of the residual student."""
    batch, heads, keys, width = query_shape
    chunk = min(chunk, queries)
    part = training_heads(options, keys, chunk) * _head_bytes(options, keys, chunk)
    # The near mask, and what comes of all queries, with gradients.
    return part + queries * keys + 4 * batch * heads * queries * 8 * width


def serving_bytes(
    options: StudentOptions,
    query_shape: Sequence[int],
    dtype: torch.dtype,
    layout: TokenLayout,
    device: torch.device,
) -> int:
    """`Student.serving_bytes` of the residual student."""
    batch, heads, tokens, width = query_shape
    wide: int = accumulation_dtype(dtype).itemsize
    size: int = dtype.itemsize if accumulates(device, dtype) else wide
    bounds, tiles = sizes(device), tile_count(layout)
    group = heads_at_a_time(heads, width, width, size, tiles, device)
    features = options.features if has_far(layout, options.window_radius) else 0
    exact = max(window_tiles(grid, options.window_radius) for grid in layout.grids)
    columns = layout.text_tokens + features + exact * SLOTS

    # Query, key, value and output by tile, and one of them on the way; the common keys.
    by_tile = size * (tiles * SLOTS * 5 * width + 2 * columns * width)
    # Exponents, projections, and sums of features with values, out of windows and in bands.
    far = wide * tiles * features * (SLOTS + SLOTS // 2 + 3 * width)
    row = wide * SLOTS * columns
    run = min(tiles, max(1, bounds.logits // (group * row)))
    slides = device.type == "cpu" and group == 1
    if slides:
        run = min(run, max(-(-columns_ // SIDE) for _, columns_ in layout.grids))
    loop = run * 3 * row
    if not slides:
        loop += run * 2 * exact * SLOTS * width * size
    working = group * (by_tile + far + loop)
    return working + batch * heads * tokens * width * dtype.itemsize
