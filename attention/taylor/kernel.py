"""The sums of Taylor attention in plain torch, blocked over keys, queries and features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .features import (
    base_weights,
    degree_dim,
    feature_dim,
    next_degree,
    next_lead_degree,
    product_weights,
)
from .plan import Chunk, Piece, Plan, make_plan, stages


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of the working memory, in bytes.

    Attributes:
        block: features and products of one block of tokens; sets automatic block sizes.
        sums: sums that one stage holds.
        heads: copies of query, key, value and output, of the heads that are computed at a time.
    """

    block: int
    sums: int
    heads: int


CPU_BUDGET = Budget(block=4 * 2**20, sums=256 * 2**20, heads=64 * 2**20)
"""Blocks that stay in the cache."""

DEVICE_BUDGET = Budget(block=256 * 2**20, sums=1024 * 2**20, heads=1024 * 2**20)
"""Blocks that keep a large device busy."""


def budget(device: torch.device) -> Budget:
    """The bounds for a device."""
    return CPU_BUDGET if device.type == "cpu" else DEVICE_BUDGET


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the input is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_size(requested: int, tokens: int, row_bytes: int, limit: int) -> int:
    """Tokens per block: as requested, or for 0 as many as ``limit`` bytes hold.

    Automatic blocks are equal but for the last one, and at least 64 tokens long.
    """
    if requested:
        return min(requested, tokens)
    most = max(64, limit // max(1, row_bytes))
    blocks = max(1, math.ceil(tokens / most))
    return min(tokens, 16 * math.ceil(tokens / blocks / 16))


def head_groups(
    batch: int, heads: int, head_bytes: int, limit: int
) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and heads that are computed at a time, ``limit`` bytes at most."""
    most = max(1, limit // max(1, head_bytes))
    if most >= batch * heads:
        yield slice(0, batch), slice(0, heads)
        return
    step = math.ceil(heads / math.ceil(heads / most))
    for row in range(batch):
        for first in range(0, heads, step):
            yield slice(row, row + 1), slice(first, min(first + step, heads))


def stage_features(plan: Plan, group: int, size: int, bounds: Budget) -> int:
    """How many features' sums one stage may hold."""
    return bounds.sums // (group * plan.columns * size)


class _Workspace:
    """Buffers of one call, reused from block to block."""

    def __init__(self, plan: Plan, group: int, block: int, like: torch.Tensor) -> None:
        self.plan, self.group = plan, group
        self._base = like.new_empty(group * plan.base * block)
        self._leads = like.new_empty(group * plan.lead_rows * block)
        self._scale = like.new_empty(group * plan.scale_rows * block)
        self._work = like.new_empty(group * plan.work_rows * block)
        self._acc = like.new_empty(group * plan.columns * block)

    def _view(self, buffer: torch.Tensor, *shape: int) -> torch.Tensor:
        return buffer[: self.group * math.prod(shape)].view(self.group, *shape)

    def accumulator(self, tokens: int) -> torch.Tensor:
        return self._view(self._acc, self.plan.columns, tokens)

    def load(self, x: torch.Tensor) -> None:
        """Build base and lead monomials of ``x`` ``[G, d, n]``."""
        plan, tokens = self.plan, x.shape[2]
        self.x = x
        self.base = self._view(self._base, plan.base, tokens)
        self.base[:, :1] = 1.0
        self.tails = self.base[:, :1]
        filled = 1
        for degree in range(1, plan.tail + 1):
            width = degree_dim(plan.head_dim, degree)
            out = self.base[:, filled : filled + width]
            self.tails = next_degree(x, self.tails, degree, out=out)
            filled += width
        if not plan.lead_rows:
            return
        self.lead = self._view(self._leads, plan.lead_rows, tokens)
        self.lead[:, :1] = 1.0
        previous = self.lead[:, :1]
        filled, degree = 1, 1
        while filled < plan.lead_rows:
            width = degree_dim(plan.head_dim, degree)
            previous = next_lead_degree(
                x, previous, degree, out=self.lead[:, filled : filled + width]
            )
            filled, degree = filled + width, degree + 1

    def leads_of(self, piece: Piece) -> torch.Tensor:
        """``[G, leads, n]``"""
        own = self.x[:, piece.coordinate : piece.coordinate + 1]
        if piece.degree == 1:
            return own
        first = feature_dim(self.plan.head_dim, piece.degree - 1) + piece.start
        out = self._view(self._scale, piece.leads, self.x.shape[2])
        return torch.mul(own, self.lead[:, first : first + piece.leads], out=out)

    def tails_of(self, piece: Piece) -> torch.Tensor:
        """``[G, tails, n]``"""
        return self.tails[:, -piece.tails :]

    def explicit(self, chunk: Chunk) -> torch.Tensor:
        """The features of a chunk whose values aren't scaled, ``[G, features, n]``."""
        if not chunk.pieces:
            return self.base
        out = self._view(self._work, chunk.features, self.x.shape[2])
        filled = 0
        for piece in chunk.pieces:
            part = out[:, filled : filled + piece.features]
            torch.mul(
                self.leads_of(piece)[:, :, None],
                self.tails_of(piece)[:, None],
                out=part.view(self.group, piece.leads, piece.tails, -1),
            )
            filled += piece.features
        return out

    def products(self, piece: Piece) -> torch.Tensor:
        """Room for values times leads, ``[G, leads, Dv + 1, n]``."""
        return self._view(self._work, piece.leads, self.plan.columns, self.x.shape[2])


def _weigh(plan: Plan, chunk: Chunk, total: torch.Tensor, constant: bool) -> None:
    """Multiply sums by the multiplicity weights of their features, in place."""
    device, dtype = total.device, total.dtype
    if not chunk.pieces:
        total *= base_weights(plan.head_dim, plan.tail, device, dtype)
        if not constant:
            total[:, :, :1] = 0.0
        return
    parts = [
        product_weights(
            plan.head_dim,
            piece.degree,
            plan.tail,
            piece.coordinate,
            slice(piece.start, piece.stop),
            device,
            dtype,
        )
        for piece in chunk.pieces
    ]
    if chunk.scaled:
        total.view(len(total), -1, plan.columns, total.shape[2]).mul_(parts[0][:, None])
    else:
        total *= torch.cat([part.flatten() for part in parts])


def _add_keys(space: _Workspace, chunk: Chunk, values: torch.Tensor, total: torch.Tensor) -> None:
    """Add a block of keys to the sums of a chunk. ``values``: ``[G, Dv + 1, n]``."""
    if not chunk.scaled:
        torch.baddbmm(total, values, space.explicit(chunk).transpose(1, 2), out=total)
        return
    (piece,) = chunk.pieces
    scaled = torch.mul(
        space.leads_of(piece)[:, :, None], values[:, None], out=space.products(piece)
    )
    torch.baddbmm(total, scaled.flatten(1, 2), space.tails_of(piece).transpose(1, 2), out=total)


def _add_to_queries(
    space: _Workspace, chunk: Chunk, total: torch.Tensor, acc: torch.Tensor
) -> None:
    """Add what a chunk gives a block of queries. ``acc``: ``[G, Dv + 1, n]``."""
    if not chunk.scaled:
        torch.baddbmm(acc, total, space.explicit(chunk), out=acc)
        return
    (piece,) = chunk.pieces
    products = space.products(piece)
    torch.bmm(total, space.tails_of(piece), out=products.flatten(1, 2))
    leads = space.leads_of(piece)
    for index in range(piece.leads):
        acc.addcmul_(products[:, index], leads[:, index : index + 1])


def _accumulate(
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    terms: int,
    out: torch.Tensor,
    *,
    constant: bool,
    block_q: int,
    block_k: int,
) -> None:
    """Add the sums of some heads to ``out``, all tensors feature-major.

    Args:
        query: ``[G, d, Nq]``.
        key: ``[G, d, Nk]``.
        values: ``[G, Dv + 1, Nk]``: weighted values, and the weights below them.
        terms: P.
        out: ``[G, Dv + 1, Nq]``: numerators, and denominators below them.
        constant: whether degree 0 counts.
        block_q: queries per block, 0 for automatic.
        block_k: keys per block, 0 for automatic.
    """
    group, head_dim, queries = query.shape
    keys, size = key.shape[2], key.element_size()
    plan = make_plan(head_dim, values.shape[1] - 1, terms)
    bounds = budget(query.device)
    row_bytes = group * plan.rows * size
    block_q = block_size(block_q, queries, row_bytes, bounds.block)
    block_k = block_size(block_k, keys, row_bytes, bounds.block)
    space = _Workspace(plan, group, max(block_q, block_k), query)
    for stage in stages(plan, stage_features(plan, group, size, bounds)):
        totals = [key.new_zeros(group, *plan.sum_shape(chunk)) for chunk in stage]
        for start in range(0, keys, block_k):
            chosen = slice(start, start + block_k)
            space.load(key[:, :, chosen])
            for chunk, total in zip(stage, totals):  # noqa: B905
                _add_keys(space, chunk, values[:, :, chosen], total)
        for chunk, total in zip(stage, totals):  # noqa: B905
            _weigh(plan, chunk, total, constant)
        for start in range(0, queries, block_q):
            chosen = slice(start, start + block_q)
            space.load(query[:, :, chosen])
            acc = space.accumulator(space.x.shape[2]).zero_()
            for chunk, total in zip(stage, totals):  # noqa: B905
                _add_to_queries(space, chunk, total, acc)
            out[:, :, chosen] += acc


def _feature_major(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[B, H, N, d]`` as contiguous ``[B·H, d, N]``; ``x`` itself where it lies so already."""
    return x.to(dtype).transpose(-2, -1).contiguous().flatten(0, 1)


@torch.no_grad()
def sums(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: int,
    *,
    weights: torch.Tensor | None = None,
    constant: bool = True,
    block_q: int = 0,
    block_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators and denominators of attention with exp replaced by its first ``terms`` terms.

    ``Σⱼ wⱼ Σ_{p < P} (q·kⱼ)^p / p! · vⱼ``, and the same without v, through the sums
    ``S = Σⱼ wⱼ ψ(kⱼ) vⱼᵀ`` and ``z = Σⱼ wⱼ ψ(kⱼ)`` over unique monomials ψ.

    Args:
        query: ``[B, H, Nq, D]``, any floating dtype; half of the scale folded in.
        key: ``[B, H, Nk, D]``, the other half folded in.
        value: ``[B, H, Nk, Dv]``; Dv may be 0, which leaves the denominators alone.
        terms: P, from 1 to 8; the degree is P - 1.
        weights: ``[B or 1, H or 1, Nk]``, a factor on each key's term; None for 1. A key whose
            weight is 0 doesn't count but must be finite; `centring.centre` sees to that.
        constant: whether degree 0 counts.
        block_q: queries at a time; 0 chooses.
        block_k: keys at a time; 0 chooses.

    Returns:
        Numerator ``[B, H, Nq, Dv]`` and denominator ``[B, H, Nq, 1]``, in float32 (float64 for
        float64 input).

    Raises:
        ValueError: ``terms`` is out of its range.
    """
    if not 1 <= terms <= 8:
        raise ValueError(f"terms: {terms} is not allowed; allowed: 1 to 8")
    dtype = accumulation_dtype(query.dtype)
    batch, heads, queries, head_dim = query.shape
    keys, columns = key.shape[2], value.shape[3] + 1
    both = query.new_zeros(batch, heads, columns, queries, dtype=dtype)
    head_bytes = dtype.itemsize * (queries + keys) * (head_dim + columns)
    for rows, some in head_groups(batch, heads, head_bytes, budget(query.device).heads):
        k = _feature_major(key[rows, some], dtype)
        values = k.new_empty(k.shape[0], columns, keys)
        v = _feature_major(value[rows, some], dtype)
        if weights is None:
            values[:, :-1].copy_(v)
            values[:, -1:] = 1.0
        else:
            w = weights.expand(batch, heads, keys)[rows, some].flatten(0, 1)[:, None].to(dtype)
            torch.mul(v, w, out=values[:, :-1])
            values[:, -1:].copy_(w)
        _accumulate(
            _feature_major(query[rows, some], dtype),
            k,
            values,
            terms,
            both[rows, some].flatten(0, 1),
            constant=constant,
            block_q=block_q,
            block_k=block_k,
        )
    return both[:, :, :-1].transpose(2, 3), both[:, :, -1:].transpose(2, 3)
