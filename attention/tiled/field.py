"""What lies beyond the windows of query tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..token_layout import TokenLayout
from . import far, select
from .cross import Cross
from .options import Options, picked_tiles, window_tiles
from .pool import Pooled, pool
from .products import multiply
from .tiles import Tiles
from .workspace import Workspace


@dataclass(frozen=True, slots=True)
class Field:
    """What is not in a window.

    Attributes:
        pooled: None where every tile is exact.
        cross: H of the tiles; None where not needed.
        picks: ``[G, T, K]`` int64; None for none.
        excluded: ``[G or 1, T, T]``, -inf where the column's tile is exact for the row's, else 0.
        bias: of the pseudo-keys, ``[G or 1, T, M]``: log n + c', or -inf where the tile is exact.
        weights: of the first-order terms, ``[G, T / shared, T]``; None without.
        shared: query tiles that share such a term.
    """

    pooled: Pooled | None
    cross: Cross | None = None
    picks: torch.Tensor | None = None
    excluded: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    shared: int = 1

    @classmethod
    def build(
        cls,
        tiles: Tiles,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: TokenLayout,
        options: Options,
        space: Workspace,
    ) -> Field:
        picked = picked_tiles(tiles.count, layout, options)
        least = min((window_tiles(grid, options.radius) for grid in layout.grids), default=0)
        if least + picked >= tiles.count and picked == 0:
            return cls(None)
        pooled = pool(tiles, query, key, value, block=options.block, spread=options.correction)
        cross = None
        if options.first_order or picked:
            cross = Cross.of(tiles, key, value, pooled, space)
        corrected = far.correction(pooled)
        mass = pooled.log_count if corrected is None else pooled.log_count + corrected[0]
        logits = multiply(pooled.query, pooled.key.transpose(-2, -1)) + mass
        excluded = select.excluded_windows(tiles, options.radius, query.dtype).unsqueeze(0)
        picks = None
        if picked:
            assert cross is not None
            picks = select.pick(logits, cross.norm(), excluded, picked)
            excluded = excluded.expand(query.shape[0], -1, -1).scatter(2, picks, -math.inf)
        weights, shared = None, 1
        if options.first_order:
            own = far.tile_weights(
                logits, None if corrected is None else corrected[1], excluded, tiles.live
            )
            weights, shared = far.shared(own, layout)
        bias = excluded.repeat_interleave(pooled.blocks, dim=-1) + mass
        return cls(pooled, cross, picks, excluded, bias, weights, shared)
