"""Attention by tiles: exact keys and pseudo-keys in one softmax, in plain torch.

The query of a tile sees the text exactly, the tiles of its window and those picked for it exactly,
and every other tile as the pseudo-keys of `pool`. All share one normaliser. The phases are those
of a fused kernel: pool, select, products of the far field, and the loop over query tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..taylor.kernel import accumulation_dtype
from ..token_layout import TokenLayout
from ..variant import Dense
from .field import Field
from .loop import Loop
from .mass import log_mass
from .options import Options
from .sizes import heads_at_a_time
from .tiles import SLOTS, Tiles, cut, from_tiles, into_tiles
from .workspace import Workspace


@dataclass(frozen=True, slots=True)
class Attended:
    """What came of it.

    Attributes:
        out: ``[B, H, N, Dv]`` in the query's dtype.
        log_mass: ``[B, H, S]`` float32, log of the joint denominator of the rows that were asked
            for; None for none.
    """

    out: torch.Tensor
    log_mass: torch.Tensor | None


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    layout: TokenLayout,
    options: Options,
    *,
    log_mass_rows: torch.Tensor | None = None,
    dense: Dense | None = None,
) -> Attended:
    """Attend by tiles.

    Args:
        query: ``[B, H, N, D]``, any floating dtype; sums are in float32, or float64 for float64.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, Dv]``.
        scale: factor on q·k.
        layout: of the N tokens.
        options: how to approximate.
        log_mass_rows: ``[S]`` int64 on the query's device: of `Attended.log_mass`.
        dense: attends text queries to all keys; None for torch's own.

    Raises:
        ValueError: the layout has another number of tokens.
    """
    batch, heads, tokens, _ = query.shape
    if layout.tokens != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"layout: holds {layout.tokens} tokens; allowed: those of query ({tokens}) and key "
            f"({key.shape[2]})"
        )
    text = layout.text_tokens
    out = query.new_empty(batch, heads, tokens, value.shape[3])
    mass = None
    if log_mass_rows is not None:
        mass = query.new_empty(batch, heads, len(log_mass_rows), dtype=torch.float32)
    if text:
        if dense is None:
            dense = partial(torch.nn.functional.scaled_dot_product_attention, scale=scale)
        out[:, :, :text] = dense(query[:, :, :text], key, value)
    tiles = cut(layout, query.device)
    space = Workspace(query, accumulation_dtype(query.dtype))
    for row, some in head_groups(query, value, tiles.count):
        q, k, v, target = (x[row, some] for x in (query, key, value, out))
        of_rows = _attend_heads(
            q, k, v, scale, layout, tiles, options, space, log_mass_rows, target
        )
        if mass is not None and of_rows is not None:
            mass[row, some] = of_rows
    return Attended(out, mass)


def head_groups(
    query: torch.Tensor, value: torch.Tensor, tiles: int
) -> Iterator[tuple[int, slice]]:
    """Row of the batch and heads that are computed at a time."""
    batch, heads, _, width = query.shape
    size = accumulation_dtype(query.dtype).itemsize
    step = heads_at_a_time(heads, width, value.shape[3], size, tiles, query.device)
    for row in range(batch):
        for first in range(0, heads, step):
            yield row, slice(first, min(first + step, heads))


def _attend_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    layout: TokenLayout,
    tiles: Tiles,
    options: Options,
    space: Workspace,
    rows: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor | None:
    """Fill the image rows of ``out`` ``[G, N, Dv]`` of G heads; `log_mass` of ``rows``."""
    dtype = accumulation_dtype(query.dtype)
    text, heads = layout.text_tokens, query.shape[0]

    def by_tile(name: str, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        slots = space.take(name, (heads, tiles.count, SLOTS, x.shape[-1]))
        into_tiles(tiles, x[:, text:], slots, factor)
        return slots

    queries = by_tile("query", query, scale)
    keys, values = by_tile("key", key), by_tile("value", value)
    text_key, text_value = key[:, :text].to(dtype), value[:, :text].to(dtype)
    field = Field.build(tiles, queries, keys, values, layout, options, space)
    loop = Loop(tiles, queries, keys, values, text_key, text_value, field, options, space)
    # The loop is done with a run's queries when it fills that run's rows.
    attended = queries if queries.shape == values.shape else space.take("attended", values.shape)
    loop.run(attended)
    from_tiles(tiles, attended, out[:, text:])
    if rows is None:
        return None
    some = query.index_select(1, rows).to(dtype) * scale
    return log_mass(some, text_key, keys, rows, tiles, field, space)
