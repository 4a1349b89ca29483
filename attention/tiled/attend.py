"""Attention by tiles: exact keys and pseudo-keys in one softmax, in plain torch.

The query of a tile sees the text exactly, the tiles of its window and those picked for it exactly,
and every other tile as the pseudo-keys of `pool`. All share one normaliser. The phases are those
of a fused kernel: pool, select, products of the far field, and the loop over query tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..taylor.kernel import accumulation_dtype
from ..token_layout import TokenLayout
from . import far, near, select
from .pool import Pooled, pool
from .products import add_product, multiply
from .tiles import SLOTS, Tiles, cut, from_tiles, into_tiles, window_width, windows
from .workspace import Workspace


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


@dataclass(frozen=True, slots=True)
class Attended:
    """What came of it.

    Attributes:
        out: ``[B, H, N, Dv]`` in the query's dtype.
        log_mass: ``[B, H, N]`` float32, log of the joint denominator; None where not asked for.
    """

    out: torch.Tensor
    log_mass: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Working memory that may be used, in bytes: a trade of speed.

    Attributes:
        heads: copies and pooled tiles of the heads that are computed at a time.
        logits: of one run of query tiles.
        cross: first-order terms of query tiles.
    """

    heads: int
    logits: int
    cross: int


CPU_SIZES = Sizes(heads=0, logits=6 * 2**20, cross=32 * 2**20)
"""One head at a time, and logits that stay in the cache."""

DEVICE_SIZES = Sizes(heads=1024 * 2**20, logits=512 * 2**20, cross=512 * 2**20)


def sizes(device: torch.device) -> Sizes:
    """The bounds for a device."""
    return CPU_SIZES if device.type == "cpu" else DEVICE_SIZES


def picked_tiles(tiles_: int, layout: TokenLayout, options: Options) -> int:
    """How many tiles a query tile can have beside its window: ``top_k`` or what is left."""
    most = max((window_tiles(grid, options.radius) for grid in layout.grids), default=0)
    return min(options.top_k, tiles_ - most)


def window_tiles(grid: tuple[int, int], radius: int) -> int:
    """Tiles of a window in a grid of so many rows and columns of tokens."""
    high, wide = (window_width(-(-size // 8), radius) for size in grid)
    return high * wide


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    layout: TokenLayout,
    options: Options,
    *,
    wants_log_mass: bool = False,
) -> Attended:
    """Attend by tiles.

    Args:
        query: ``[B, H, N, D]``, any floating dtype; sums are in float32, or float64 for float64.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, Dv]``.
        scale: factor on q·k.
        layout: of the N tokens.
        options: how to approximate.
        wants_log_mass: whether to compute `Attended.log_mass`.

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
    if wants_log_mass:
        mass = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    if text:
        out[:, :, :text] = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, :text], key, value, scale=scale
        )
    tiles = cut(layout, query.device)
    space = Workspace(query, accumulation_dtype(query.dtype))
    for row, some in head_groups(query, value, tiles.count):
        q, k, v, target = (x[row, some] for x in (query, key, value, out))
        target_mass = None if mass is None else mass[row, some]
        _attend_heads(q, k, v, scale, layout, tiles, options, space, target, target_mass)
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


def heads_at_a_time(
    heads: int, width: int, value_width: int, size: int, tiles: int, device: torch.device
) -> int:
    """How many of ``heads`` heads the bounds of a device allow, at least one.

    Args:
        heads: of a picture.
        width: D.
        value_width: Dv.
        size: bytes of a number.
        tiles: T.
        device: where.
    """
    per_head = size * tiles * (SLOTS * 3 * (width + value_width) + 2 * width * value_width)
    most = max(1, sizes(device).heads // max(1, per_head))
    return math.ceil(heads / math.ceil(heads / most))


def _attend_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    layout: TokenLayout,
    tiles: Tiles,
    options: Options,
    space: Workspace,
    out: torch.Tensor,
    mass: torch.Tensor | None,
) -> None:
    """Fill the image rows of ``out`` ``[G, N, Dv]`` and all of ``mass`` ``[G, N]``, of G heads."""
    dtype = accumulation_dtype(query.dtype)
    text, heads = layout.text_tokens, query.shape[0]

    def by_tile(name: str, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        slots = space.take(name, (heads, tiles.count, SLOTS, x.shape[-1]))
        into_tiles(tiles, x[:, text:], slots, factor)
        return slots

    queries = by_tile("query", query, scale)
    keys, values = by_tile("key", key), by_tile("value", value)
    field = _Field.build(tiles, queries, keys, values, layout, options, space)
    loop = _Loop(
        tiles, queries, keys, values,
        key[:, :text].to(dtype), value[:, :text].to(dtype), field, options, space,
    )  # fmt: skip
    attended = space.take("attended", values.shape)
    slot_mass = queries.new_empty(queries.shape[:3]) if mass is not None else None
    loop.run(attended, slot_mass)
    from_tiles(tiles, attended, out[:, text:])
    if mass is not None and slot_mass is not None:
        mass[:, :text] = _log_mass(query[:, :text].to(dtype) * scale, key.to(dtype))
        from_tiles(tiles, slot_mass.unsqueeze(-1), mass[:, text:].unsqueeze(-1))


def _log_mass(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """logsumexp of the logits of ``[G, n, D]`` and ``[G, N, D]``: ``[G, n]``, by blocks."""
    parts = [
        torch.matmul(rows, key.transpose(-2, -1)).logsumexp(dim=-1)
        for rows in torch.split(query, 128, dim=1)
    ]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True)
class _Field:
    """What is not in a window.

    Attributes:
        pooled: None where every tile is exact.
        picks: ``[G, T, K]`` int64; None for none.
        bias: of the pseudo-keys, ``[G or 1, T, M]``: log n + c', or -inf where the tile is exact.
        weights: of the first-order terms, ``[G, T / shared, T]``; None without.
        shared: query tiles that share such a term.
    """

    pooled: Pooled | None
    picks: torch.Tensor | None = None
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
    ) -> _Field:
        picked = picked_tiles(tiles.count, layout, options)
        least = min((window_tiles(grid, options.radius) for grid in layout.grids), default=0)
        if least + picked >= tiles.count and picked == 0:
            return cls(None)
        pooled = pool(
            tiles, query, key, value, space,
            block=options.block,
            spread=options.correction,
            cross=options.first_order or picked > 0,
        )  # fmt: skip
        corrected = far.correction(pooled)
        mass = pooled.log_count if corrected is None else pooled.log_count + corrected[0]
        logits = multiply(pooled.query, pooled.key.transpose(-2, -1)) + mass
        excluded = select.excluded_windows(tiles, options.radius, query.dtype).unsqueeze(0)
        picks = None
        if picked:
            assert pooled.cross is not None
            norm = pooled.cross.flatten(2).norm(dim=-1)
            picks = select.pick(logits, norm, excluded, picked)
            excluded = excluded.expand(query.shape[0], -1, -1).scatter(2, picks, -math.inf)
        weights, shared = None, 1
        if options.first_order:
            own = far.tile_weights(
                logits, None if corrected is None else corrected[1], excluded, tiles.live
            )
            weights, shared = far.shared(own, tiles)
        bias = excluded.repeat_interleave(pooled.blocks, dim=-1) + mass
        return cls(pooled, picks, bias, weights, shared)


class _Loop:
    """The loop over query tiles."""

    def __init__(
        self,
        tiles: Tiles,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        text_key: torch.Tensor,
        text_value: torch.Tensor,
        field: _Field,
        options: Options,
        space: Workspace,
    ) -> None:
        self._space = space
        self._tiles, self._field, self._options = tiles, field, options
        self._query, self._key, self._value = query, key, value
        # Text and pseudo-keys are the same for every query: one product serves both.
        self._text = text_key.shape[1]
        self._common_key, self._common_value = text_key, text_value
        if field.pooled is not None:
            self._common_key = torch.cat([text_key, field.pooled.key], dim=1)
            self._common_value = torch.cat([text_value, field.pooled.value], dim=1)
        self._slides = query.device.type == "cpu" and query.shape[0] == 1
        self._dead = None
        if not tiles.full:
            slot = torch.arange(SLOTS, device=query.device)
            dead = slot >= tiles.live[:, None]
            self._dead = torch.zeros_like(dead, dtype=query.dtype).masked_fill_(dead, -math.inf)

    def run(self, out: torch.Tensor, mass: torch.Tensor | None) -> None:
        """Fill ``out`` ``[G, T, 64, Dv]`` and, where wanted, ``mass`` ``[G, T, 64]``."""
        bounds = sizes(out.device)
        heads, _, _, width = self._query.shape
        columns = max(self._columns(grid.first) for grid in self._tiles.grids)
        row = self._query.element_size() * heads * SLOTS * columns
        most = max(1, bounds.logits // row)
        all_runs = list(near.runs(self._tiles.grids, most, self._slides))
        rows = max(run.count for run in all_runs) * heads * SLOTS
        work = self._space.take("logits", (2, rows * columns))
        held = self._query.element_size() * heads * width * out.shape[-1]
        for together in _together(all_runs, max(1, bounds.cross // held)):
            begin = together[0].first // self._field.shared
            terms = self._terms(begin, together[-1].last)
            for run in together:
                self._attend(run, work, terms, begin, out, mass)

    def _terms(self, begin: int, last: int) -> torch.Tensor | None:
        """First-order terms ``[G, t, D, Dv]`` from the one numbered ``begin`` to tile ``last``."""
        field = self._field
        if field.weights is None or field.pooled is None:
            return None
        end = -(-last // field.shared)
        return far.first_order(field.weights[:, begin:end], field.pooled, self._space)

    def _linear(
        self, run: near.Run, query: torch.Tensor, terms: torch.Tensor, begin: int
    ) -> torch.Tensor:
        """What the first-order terms make of a run's queries, ``[G, t·64, Dv]``."""
        shared = self._field.shared
        first, last = run.first // shared, -(-run.last // shared)
        own = terms[:, first - begin : last - begin]
        if run.first % shared == 0 and run.last % shared == 0:
            # Tiles that share a term are one matrix.
            query = query.reshape(query.shape[0], last - first, -1, query.shape[-1])
        else:
            own = own.repeat_interleave(shared, dim=1)
            own = own[:, run.first - first * shared :][:, : run.count]
        return torch.matmul(query, own).flatten(1, 2)

    def _columns(self, tile: int) -> int:
        """Keys and pseudo-keys of a query in the grid of a tile."""
        picked = 0 if self._field.picks is None else self._field.picks.shape[-1]
        exact = self._windows(tile).shape[1] + picked
        return self._common_key.shape[1] + exact * SLOTS

    def _windows(self, tile: int) -> torch.Tensor:
        grid = next(grid for grid in self._tiles.grids if grid.first <= tile < grid.last)
        return windows(grid, self._options.radius, self._query.device)

    def _batches(self, run: near.Run) -> list[list[near.Batch]]:
        """Exact tiles of a run: those of the window, then those picked."""
        if self._slides:
            window = list(near.sliding(self._key, self._value, run, self._options.radius))
        else:
            window = [near.gathered(self._key, self._value, self._numbers(run))]
        if self._field.picks is None:
            return [window]
        picks = self._field.picks[:, run.first : run.last]
        return [window, [near.gathered(self._key, self._value, picks)]]

    def _numbers(self, run: near.Run) -> torch.Tensor:
        first = run.grid.first
        return self._windows(first)[run.first - first : run.last - first].unsqueeze(0)

    def _attend(
        self,
        run: near.Run,
        work: torch.Tensor,
        terms: torch.Tensor | None,
        begin: int,
        out: torch.Tensor,
        mass: torch.Tensor | None,
    ) -> None:
        query = self._query[:, run.first : run.last]
        heads, count, _, width = query.shape
        common, columns = self._common_key.shape[1], self._columns(run.first)
        shape = (heads, count, SLOTS, columns)
        logits, weights = (half[: math.prod(shape)].view(shape) for half in work)
        flat = query.reshape(heads, count * SLOTS, width)
        by_head = logits.view(heads, count * SLOTS, columns)
        multiply(flat, self._common_key.transpose(-2, -1), out=by_head[:, :, :common])
        if self._field.bias is not None:
            bias = self._field.bias[:, run.first : run.last].unsqueeze(2)
            logits[..., self._text : common] += bias
        batches = self._batches(run)
        place = common
        for batch_list in batches:
            place = _near_logits(query, batch_list, logits, place, self._space)
        if self._dead is not None:
            self._leave_out_dead(run, logits, common)
        torch.softmax(logits, dim=-1, out=weights)
        if mass is not None:
            mass[:, run.first : run.last] = logits.logsumexp(dim=-1)
        by_head = weights.view(heads, count * SLOTS, columns)
        target = out[:, run.first : run.last]
        # Of several heads, a run's rows aren't one piece of memory.
        attended = (target if heads == 1 else target.new_empty(target.shape)).flatten(1, 2)
        multiply(by_head[:, :, :common], self._common_value, out=attended)
        place = common
        for batch_list in batches:
            place = _add_near(attended, weights, batch_list, place)
        if terms is not None:
            share = by_head[:, :, self._text : common].sum(dim=-1, keepdim=True)
            attended.addcmul_(self._linear(run, query, terms, begin), share)
        if heads > 1:
            target.copy_(attended.view(target.shape))

    def _leave_out_dead(self, run: near.Run, logits: torch.Tensor, place: int) -> None:
        assert self._dead is not None
        numbers = self._numbers(run)
        picks = self._field.picks
        if picks is not None:
            numbers = numbers.expand(picks.shape[0], -1, -1)
            numbers = torch.cat([numbers, picks[:, run.first : run.last]], dim=-1)
        bias = self._dead[numbers].flatten(2).unsqueeze(2)  # [G or 1, t, 1, keys]
        logits[..., place : place + bias.shape[-1]] += bias


def _near_logits(
    query: torch.Tensor,
    batches: list[near.Batch],
    logits: torch.Tensor,
    place: int,
    space: Workspace,
) -> int:
    """Logits of exact tiles from column ``place`` on; the column after them."""
    keys = batches[0].key.shape[1]
    for batch in batches:
        parts = batch.key.shape[0]
        rows = query[:, batch.first : batch.last].reshape(parts, -1, query.shape[-1])
        # Into memory of its own: a batch of products into columns of a larger matrix is slower.
        product = space.take("near", (parts, rows.shape[1], keys))
        multiply(rows, batch.key.transpose(-2, -1), out=product)
        target = logits[:, batch.first : batch.last, :, place : place + keys]
        target.copy_(product.view(target.shape))
    return place + keys


def _add_near(
    attended: torch.Tensor, weights: torch.Tensor, batches: list[near.Batch], place: int
) -> int:
    """Add the weighted values of exact tiles from column ``place`` on; the column after them."""
    keys = batches[0].value.shape[1]
    heads, count = weights.shape[:2]
    by_tile = attended.view(heads, count, SLOTS, -1)
    for batch in batches:
        parts = batch.value.shape[0]
        rows = weights[:, batch.first : batch.last, :, place : place + keys]
        target = by_tile[:, batch.first : batch.last].view(parts, -1, attended.shape[-1])
        merged = rows.view(parts, target.shape[1], keys)
        add_product(target, merged, batch.value)
    return place + keys


def _together(all_runs: list[near.Run], most: int) -> Iterator[list[near.Run]]:
    """Successive runs of up to ``most`` tiles in all, or one run."""
    held: list[near.Run] = []
    for run in all_runs:
        if held and run.last - held[0].first > most:
            yield held
            held = []
        held.append(run)
    if held:
        yield held
