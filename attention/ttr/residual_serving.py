"""The residual student's fast form: its features as pseudo-keys in one softmax.

A feature of the query has the exponent ``q·(k̄ ± w_f)`` plus what only depends on the query or the
feature. With z the sum of the keys' features out of a tile's window and S the same with values,
the far part is that of F pseudo-keys ``k̄ ± w_f`` with the bias log z and the value S / z. Pseudo-
keys are the same for every query tile, bias and values are its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from ..quality import accumulates
from ..taylor.kernel import accumulation_dtype
from ..tiled import near
from ..tiled.attend import head_groups
from ..tiled.products import add_product, multiply
from ..tiled.select import excluded_windows
from ..tiled.sizes import sizes
from ..tiled.tiles import (
    SLOTS,
    TileGrid,
    Tiles,
    cut,
    from_tiles,
    into_tiles,
    window_start,
    window_width,
    windows,
)
from ..tiled.workspace import Workspace
from ..token_layout import TokenLayout
from .features import FLOOR, Features
from .places import has_far
from .student import Served


@torch.no_grad()
def serve(
    features: Features,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    layout: TokenLayout,
    radius: int,
    log_mass_rows: torch.Tensor | None = None,
) -> Served:
    """`Student.serve` of the residual student.

    Args:
        features: of the H heads.
        query: ``[B, H, N, D]``.
        key: the same shape.
        value: the same shape.
        scale: factor on q·k.
        layout: of the tokens.
        radius: of the window, in tiles.
        log_mass_rows: ``[S]`` int64.
    """
    batch, heads = query.shape[:2]
    text, tiles = layout.text_tokens, cut(layout, query.device)
    dtype = _product_dtype(query)
    features = features.to(accumulation_dtype(query.dtype))
    out = query.new_empty(value.shape)
    mass = None
    if log_mass_rows is not None:
        mass = query.new_empty(batch, heads, len(log_mass_rows), dtype=torch.float32)
    if text:
        dense = partial(torch.nn.functional.scaled_dot_product_attention, scale=scale)
        out[:, :, :text] = dense(query[:, :, :text], key, value)
    space = Workspace(query, dtype)
    wide = Workspace(query, accumulation_dtype(query.dtype))
    for row, some in head_groups(query, value, tiles.count):
        call = _Heads(
            tiles, layout, radius, features.of(some), query[row, some], key[row, some],
            value[row, some], scale, space, wide,
        )  # fmt: skip
        call.attend(out[row, some])
        if mass is not None and log_mass_rows is not None:
            mass[row, some] = call.log_mass(query[row, some], log_mass_rows)
    return Served(out, mass)


class _Heads:
    """G heads of one row of the batch, by tiles."""

    def __init__(
        self,
        tiles: Tiles,
        layout: TokenLayout,
        radius: int,
        features: Features,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        space: Workspace,
        wide: Workspace,
    ) -> None:
        self._tiles, self._radius, self._features = tiles, radius, features
        self._space, self._wide = space, wide
        self._root, self._text = math.sqrt(scale), layout.text_tokens
        heads, text = query.shape[0], layout.text_tokens

        def by_tile(name: str, x: torch.Tensor, factor: float) -> torch.Tensor:
            slots = space.take(name, (heads, tiles.count, SLOTS, x.shape[-1]))
            into_tiles(tiles, x[:, text:], slots, factor)
            return slots

        self._query = by_tile("query", query, self._root)
        self._key = by_tile("key", key, self._root)
        self._value = by_tile("value", value, 1.0)
        self._common = key[:, :text].to(self._key.dtype) * self._root
        self._text_value = value[:, :text].to(self._key.dtype)
        self._slides = query.device.type == "cpu" and heads == 1
        self._dead = None
        if not tiles.full:
            slot = torch.arange(SLOTS, device=query.device)
            self._dead = slot >= tiles.live[:, None]
        self._far: _Far | None = None
        if has_far(layout, radius):
            mean = key[:, text:].mean(dim=1, keepdim=True, dtype=features.bias.dtype) * self._root
            self._far = self._far_part(mean)
            self._common = torch.cat([self._common, self._far.key], dim=1)

    def _far_part(self, mean: torch.Tensor) -> _Far:
        """The far part, for k̄ ``[G, 1, D]``."""
        features, tiles = self._features, self._tiles
        heads, count = self._key.shape[:2]
        half = features.bias.shape[1]
        exponents = self._wide.take("exponents", (heads, count * SLOTS, 2 * half))
        y = self._projected(self._key, features.key_map, mean)
        own = self._projected(self._key, features.centre.unsqueeze(1), mean)
        own -= features.damped(y, 1)
        torch.add(own, y, out=exponents[..., :half])
        torch.sub(own, y, out=exponents[..., half:])
        most = exponents.amax(dim=1, keepdim=True)
        by_tile = exponents.sub_(most).exp_().view(heads * count, SLOTS, 2 * half)
        if self._dead is not None:
            by_tile.view(heads, count, SLOTS, -1).masked_fill_(self._dead.unsqueeze(-1), 0.0)
        mass = by_tile.sum(dim=1).view(heads, count, -1)
        values = self._value.flatten(0, 1)
        if values.dtype == by_tile.dtype:
            sums = self._wide.take("sums", (heads * count, 2 * half, values.shape[-1]))
            torch.bmm(by_tile.transpose(1, 2), values, out=sums)
        else:
            sums = wide_product(by_tile.transpose(1, 2).to(values.dtype), values)
        sums = outside(tiles, sums.view(heads, count, -1), self._radius, self._wide, "far")
        mass = outside(tiles, mass, self._radius, self._wide, "mass").clamp_min_(FLOOR)
        sums = sums.view(heads, count, 2 * half, -1).div_(mass.unsqueeze(-1))

        rows = features.query_map
        signed = features.bias - torch.matmul(rows, features.centre.unsqueeze(-1)).squeeze(-1)
        bias = torch.cat([signed, -signed], dim=-1) + features.log_share.unsqueeze(-1)
        bias = mass.log() + (bias.unsqueeze(1) + most)
        x = self._projected(self._query, rows, features.centre.unsqueeze(1))
        row_term = features.damped(x, 0).neg_().view(heads, count, SLOTS, 1)
        pseudo = torch.cat([mean + rows, mean - rows], dim=1)
        dtype = self._key.dtype
        return _Far(pseudo.to(dtype), bias, sums.to(dtype), row_term)

    def _projected(
        self, slots: torch.Tensor, rows: torch.Tensor, centre: torch.Tensor
    ) -> torch.Tensor:
        """``rows·(x - centre)`` of all slots: ``[G, T·64, rows]``, in the wide dtype."""
        turned = rows.transpose(-2, -1)
        product = wide_product(slots.flatten(1, 2), turned.to(slots.dtype))
        return product.sub_(torch.matmul(centre, turned))

    def attend(self, out: torch.Tensor) -> None:
        """Fill the image rows of ``out`` ``[G, N, D]``."""
        bounds, tiles = sizes(out.device), self._tiles
        heads = self._query.shape[0]
        columns = max(self._columns(grid) for grid in tiles.grids)
        wide = self._features.bias.dtype
        most = max(1, bounds.logits // (wide.itemsize * heads * SLOTS * columns))
        attended = self._space.take("attended", self._value.shape)
        for run in near.runs(tiles.grids, most, self._slides):
            self._attend_run(run, attended)
        from_tiles(tiles, attended, out[:, self._text :])

    def _attend_run(self, run: near.Run, out: torch.Tensor) -> None:
        query = self._query[:, run.first : run.last]
        heads, count, _, width = query.shape
        common, text, columns = self._common.shape[1], self._text, self._columns(run.grid)
        logits = self._wide.take("logits", (heads, count, SLOTS, columns))
        by_head = logits.view(heads, count * SLOTS, columns)
        flat = query.reshape(heads, count * SLOTS, width)
        wide_product(flat, self._common.transpose(-2, -1), out=by_head[:, :, :common])
        batches = self._batches(run)
        for batch in batches:
            rows = query[:, batch.first : batch.last].reshape(batch.key.shape[0], -1, width)
            shape = (*rows.shape[:2], columns - common)
            product = self._wide.take("near", shape)
            # Into memory of its own: a batch of products into columns of a larger matrix is slow.
            product = wide_product(rows, batch.key.transpose(-2, -1), out=product)
            target = logits[:, batch.first : batch.last, :, common:]
            target.copy_(product.view(target.shape))
        far = self._far
        if far is not None:
            features = logits[..., text:common]
            features += far.bias[:, run.first : run.last].unsqueeze(2)
            features += far.row_term[:, run.first : run.last]
        if self._dead is not None:
            dead = self._dead[self._numbers(run)].flatten(1).view(1, count, 1, -1)
            logits[..., common:].masked_fill_(dead, -math.inf)
        weights = self._wide.take("weights", logits.shape)
        torch.softmax(logits, dim=-1, out=weights)
        weights = weights.to(query.dtype)
        by_head = weights.view(heads, count * SLOTS, columns)
        target = out[:, run.first : run.last]
        # Of several heads, a run's rows aren't one piece of memory.
        own = (target if heads == 1 else target.new_empty(target.shape)).flatten(1, 2)
        multiply(by_head[:, :, :text], self._text_value, out=own)
        by_tile = own.view(heads, count, SLOTS, -1)
        if far is not None:
            rows = weights[..., text:common].view(heads * count, SLOTS, common - text)
            values = far.value[:, run.first : run.last].reshape(heads * count, common - text, -1)
            add_product(own.view(heads * count, SLOTS, -1), rows, values)
        for batch in batches:
            parts = batch.value.shape[0]
            rows = weights[:, batch.first : batch.last, :, common:].reshape(
                parts, -1, columns - common
            )
            part = by_tile[:, batch.first : batch.last].view(parts, -1, own.shape[-1])
            add_product(part, rows, batch.value)
        if heads > 1:
            target.copy_(by_tile)

    def _columns(self, grid: TileGrid) -> int:
        """Keys and pseudo-keys of a query."""
        exact = windows(grid, self._radius, self._query.device).shape[1]
        return self._common.shape[1] + exact * SLOTS

    def _numbers(self, run: near.Run) -> torch.Tensor:
        """Tiles of each window of a run, ``[t, W]``."""
        numbers = windows(run.grid, self._radius, self._query.device)
        return numbers[run.first - run.grid.first : run.last - run.grid.first]

    def _batches(self, run: near.Run) -> list[near.Batch]:
        if self._slides:
            return list(near.sliding(self._key, self._value, run, self._radius, self._space))
        return [near.gathered(self._key, self._value, self._numbers(run).unsqueeze(0))]

    def log_mass(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Log of the joint denominator of some rows, ``[G, S]``.

        The rows' logits with all keys, those left out that are far. For a few rows that costs
        less than a pass over the logits of all.

        Args:
            query: ``[G, N, D]``.
            rows: ``[S]`` int64, counted from the first text token.
        """
        wide = self._features.bias.dtype
        text, tiles = self._text, self._tiles
        some = query.index_select(1, rows).to(wide) * self._root
        of_text = torch.matmul(some, self._common[:, :text].to(wide).transpose(-2, -1))
        own = tiles.slots[(rows - text).clamp_min(0)] // SLOTS
        excluded = excluded_windows(tiles, self._radius, wide)
        far = (excluded[own] == 0) & (rows >= text).unsqueeze(-1)  # [S, T]
        keys = self._key.flatten(1, 2).to(wide)
        image = torch.matmul(some, keys.transpose(-2, -1)).view(*some.shape[:2], -1, SLOTS)
        image.masked_fill_(far.unsqueeze(-1), -math.inf)
        if self._dead is not None:
            image.masked_fill_(self._dead, -math.inf)
        parts = [of_text, image.flatten(2)]
        if self._far is not None:
            x = torch.matmul(
                some - self._features.centre.unsqueeze(1),
                self._features.query_map.transpose(-2, -1),
            )
            pseudo = torch.matmul(some, self._far.key.to(wide).transpose(-2, -1))
            pseudo += self._far.bias[:, own] - self._features.damped(x, 0)
            parts.append(pseudo.masked_fill_((rows < text).unsqueeze(-1), -math.inf))
        return torch.cat(parts, dim=-1).logsumexp(dim=-1)


@dataclass(frozen=True, slots=True)
class _Far:
    """The features as pseudo-keys.

    Attributes:
        key: ``[G, F, D]``.
        bias: ``[G, T, F]``, of each query tile.
        value: ``[G, T, F, D]``, likewise.
        row_term: ``[G, T, 64, 1]``, of each query.
    """

    key: torch.Tensor
    bias: torch.Tensor
    value: torch.Tensor
    row_term: torch.Tensor


def outside(
    tiles: Tiles, sums: torch.Tensor, radius: int, space: Workspace, name: str
) -> torch.Tensor:
    """For each tile the sum over all tiles out of its window.

    It is added up from tiles beside the window's columns and rows of tiles above and below it:
    nothing is subtracted, so that what is small beside the window's own sum keeps its digits, and
    sums of positive numbers stay positive.

    Args:
        tiles: T of them.
        sums: ``[G, T, W]``, of each tile.
        radius: of the windows, in tiles.
        space: holds the answer.
        name: of the answer's buffer.

    Returns:
        ``[G, T, W]``.
    """
    heads, _, width = sums.shape
    out = space.take(name, sums.shape)
    whole = [sums[:, grid.first : grid.last].sum(dim=1) for grid in tiles.grids]
    for number, grid in enumerate(tiles.grids):
        rows, columns = grid.rows, grid.columns
        own = sums[:, grid.first : grid.last].view(heads, rows, columns, width)
        target = out[:, grid.first : grid.last].view(heads, rows, columns, width)
        beyond_rows = _beyond(rows, radius, sums.dtype, sums.device)
        beyond_columns = _beyond(columns, radius, sums.dtype, sums.device)
        away = torch.matmul(beyond_rows, own.sum(dim=2))
        for other, total in enumerate(whole):
            if other != number:
                away += total.unsqueeze(1)
        wide = window_width(rows, radius)
        # The window's rows of tiles lie together: one product adds up all that is beside it.
        beside = beyond_columns.repeat(1, wide).expand(heads, -1, -1)
        for row in range(rows):
            top = window_start(row, rows, radius)
            near_rows = own[:, top : top + wide].flatten(1, 2)
            if heads == 1:
                torch.addmm(away[0, row], beside[0], near_rows[0], out=target[0, row])
            else:
                target[:, row] = torch.baddbmm(away[:, row : row + 1], beside, near_rows)
    return out


@lru_cache(maxsize=32)
def _beyond(size: int, radius: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[size, size]``: 1 where the column isn't a neighbour of the row on a line, else 0."""
    with torch.inference_mode(False):
        place = torch.arange(size)
        starts = torch.tensor([window_start(row, size, radius) for row in range(size)])
        starts = starts.unsqueeze(1)
        beyond = (place < starts) | (place >= starts + window_width(size, radius))
        return beyond.to(dtype).to(device)


def wide_product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``left @ right`` of three dimensions, accumulated and returned in float32 or wider."""
    if left.dtype == torch.bfloat16:
        product = torch.bmm(left, right, out_dtype=torch.float32)
        return product if out is None else out.copy_(product)
    product = multiply(left, right, out=out)
    return product if out is None else out


def _product_dtype(query: torch.Tensor) -> torch.dtype:
    """In which products run: bfloat16 where their sums can be had in float32."""
    if accumulates(query.device, query.dtype):
        return query.dtype
    return accumulation_dtype(query.dtype)
