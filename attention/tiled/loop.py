"""The loop over query tiles: one softmax over text, near keys and pseudo-keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from . import near
from .field import Field
from .options import Options
from .products import add_product, multiply
from .sizes import sizes
from .tiles import SLOTS, Tiles, windows
from .workspace import Workspace


class Loop:
    """The loop over query tiles."""

    def __init__(
        self,
        tiles: Tiles,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        text_key: torch.Tensor,
        text_value: torch.Tensor,
        field: Field,
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

    def run(self, out: torch.Tensor) -> None:
        """Fill ``out`` ``[G, T, 64, Dv]``, which may be the queries' own memory."""
        bounds = sizes(out.device)
        heads, _, _, width = self._query.shape
        columns = max(self._columns(grid.first) for grid in self._tiles.grids)
        row = self._query.element_size() * heads * SLOTS * columns
        most = max(1, bounds.logits // row)
        all_runs = list(near.runs(self._tiles.grids, most, self._slides))
        rows = max(run.count for run in all_runs) * heads * SLOTS
        # A CPU's softmax is done with a number when it writes it; half the memory stays cached.
        parts = 1 if out.device.type == "cpu" else 2
        work = self._space.take("logits", (parts, rows * columns))
        held = self._query.element_size() * heads * width * out.shape[-1]
        for together in _together(all_runs, max(1, bounds.terms // held) * self._field.shared):
            begin = together[0].first // self._field.shared
            terms = self._terms(begin, together[-1].last)
            for run in together:
                self._attend(run, work, terms, begin, out)

    def _terms(self, begin: int, last: int) -> torch.Tensor | None:
        """First-order terms ``[G, t, D, Dv]`` from the one numbered ``begin`` to tile ``last``."""
        field = self._field
        if field.weights is None or field.cross is None:
            return None
        end = -(-last // field.shared)
        return field.cross.weighted(field.weights[:, begin:end])

    def _linear(
        self, run: near.Run, query: torch.Tensor, terms: torch.Tensor, begin: int
    ) -> torch.Tensor:
        """What the first-order terms make of a run's queries, ``[G, t·64, Dv]``."""
        shared = self._field.shared
        first, last = run.first // shared, -(-run.last // shared)
        own = terms[:, first - begin : last - begin]
        if last - first == 1:
            return torch.matmul(query.flatten(1, 2), own.squeeze(1))
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
            window = list(
                near.sliding(self._key, self._value, run, self._options.radius, self._space)
            )
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
    ) -> None:
        query = self._query[:, run.first : run.last]
        heads, count, _, width = query.shape
        common, columns = self._common_key.shape[1], self._columns(run.first)
        shape = (heads, count, SLOTS, columns)
        # The last part is the first where softmax works in place.
        logits, weights = (work[part, : math.prod(shape)].view(shape) for part in (0, -1))
        flat = query.reshape(heads, count * SLOTS, width)
        by_head = logits.view(heads, count * SLOTS, columns)
        multiply(flat, self._common_key.transpose(-2, -1), out=by_head[:, :, :common])
        if self._field.bias is not None:
            bias = self._field.bias[:, run.first : run.last].unsqueeze(2)
            logits[..., self._text : common] += bias
        linear = None if terms is None else self._linear(run, query, terms, begin)
        batches = self._batches(run)
        place = common
        for batch_list in batches:
            place = _near_logits(query, batch_list, logits, place, self._space)
        if self._dead is not None:
            self._leave_out_dead(run, logits, common)
        torch.softmax(logits, dim=-1, out=weights)
        by_head = weights.view(heads, count * SLOTS, columns)
        target = out[:, run.first : run.last]
        # Of several heads, a run's rows aren't one piece of memory.
        attended = (target if heads == 1 else target.new_empty(target.shape)).flatten(1, 2)
        multiply(by_head[:, :, :common], self._common_value, out=attended)
        place = common
        for batch_list in batches:
            place = _add_near(attended, weights, batch_list, place)
        if linear is not None:
            share = by_head[:, :, self._text : common].sum(dim=-1, keepdim=True)
            attended.addcmul_(linear, share)
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
