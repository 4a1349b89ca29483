"""Hybrid attention: near keys exactly, far keys by a series, joined by their masses or added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ..taylor import kernel
from ..taylor.features import feature_dim
from ..taylor.shaping import NormRule
from .basis import Basis
from .far import FarSums, Low, lower
from .means import Means, Tokens, means
from .near import attend_with_mass

FindBasis = Callable[[torch.Tensor, torch.Tensor, Means, torch.dtype], Basis]
"""Of query and key ``[B, H, N, D]``, the means taken out of them and a dtype: what to project
with."""


@dataclass(frozen=True, slots=True)
class Form:
    """The form of one call.

    Attributes:
        prefix: text tokens at the beginning.
        window: image tokens on either side of a block that are exact.
        chunk: queries of a block.
        weight: of the global part; 0 leaves it out.
        terms: P.
        rank: coordinates of the series.
        scale: factor on q·k of the global part.
        centre: whether means are taken out.
        norm: how norms of projected query and key change.
        wide: whether the global part is computed in float32.
        eps: relative denominators at or below it are bad.
        combine: see `settings.HybridSettings`.
    """

    prefix: int
    window: int
    chunk: int
    weight: float
    terms: int
    rank: int
    scale: float
    centre: bool
    norm: NormRule
    wide: bool
    eps: float
    combine: Literal["joint", "additive"]


@dataclass(frozen=True, slots=True)
class Attended:
    """Outcome of one call.

    Attributes:
        out: ``[B, H, N, Dv]`` in the query's dtype.
        log_mass: ``[B, H, N]``, log of the joint denominator; None for the additive form.
        least: 0-dimensional, the smallest relative denominator of the global part; None where
            there is none.
        bad: 0-dimensional, the share of them at or below eps.
    """

    out: torch.Tensor
    log_mass: torch.Tensor | None
    least: torch.Tensor | None
    bad: torch.Tensor | None


def windows(tokens: int, form: Form) -> Iterator[tuple[slice, int, int]]:
    """Blocks of image queries with the ends of their windows, counted from the first image token.

    Args:
        tokens: of the image.
        form: window and chunk.
    """
    for first in range(0, tokens, form.chunk):
        last = min(first + form.chunk, tokens)
        yield slice(first, last), max(0, first - form.window), min(tokens, last + form.window)


@torch.no_grad()
def hybrid_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    pre_rope: tuple[torch.Tensor, torch.Tensor] | None,
    form: Form,
    find_basis: FindBasis,
) -> Attended:
    """Attend.

    Args:
        query: ``[B, H, N, D]`` after rotary embedding, any floating dtype.
        key: ``[B, H, N, D]``, of the same tokens.
        value: ``[B, H, N, Dv]``.
        scale: factor on q·k.
        pre_rope: query and key before rotary embedding; may be None where ``form.weight`` is 0.
        form: what is exact and how the rest is approximated.
        find_basis: what the global part projects with.

    Raises:
        ValueError: the global part has no query and key to work on.
    """
    out = query.new_empty(*query.shape[:3], value.shape[3])
    sums_dtype = kernel.accumulation_dtype(query.dtype)
    mass = query.new_empty(query.shape[:3], dtype=sums_dtype)
    text = slice(0, form.prefix)
    if form.prefix:
        out[:, :, text], mass[:, :, text] = attend_with_mass(query[:, :, text], key, value, scale)
    if form.weight > 0.0 and pre_rope is None:
        raise ValueError("pre_rope: is None; allowed: query and key, since the weight is above 0")
    additive = form.combine == "additive"
    if pre_rope is None or form.weight == 0.0:
        _local(query, key, value, scale, form, out, mass)
        return Attended(out, None if additive else mass, None, None)
    # Far from the window is only the image; the second attention of the other form sees all.
    some = slice(0 if additive else form.prefix, None)
    before = [tensor[:, :, some] for tensor in pre_rope]
    after = [tensor[:, :, some] for tensor in (query, key)]
    tokens = Tokens(
        query=before[0],
        key=before[1],
        turned_query=after[0],
        turned_key=after[1],
        value=value[:, :, some],
        mean=means(before[0], before[1], sums_dtype, form.centre),
        turned_mean=means(after[0], after[1], sums_dtype, form.centre),
    )
    if additive:
        _local(query, key, value, scale, form, out, mass)
        return _add_global(out, tokens, form, find_basis)
    return _join(query, key, value, scale, tokens, form, find_basis, out, mass)


def _near(tensor: torch.Tensor, prefix: int, first: int, last: int) -> torch.Tensor:
    """Text and window of a key or value, in one piece where they adjoin."""
    if first == 0:
        return tensor[:, :, : prefix + last]
    if prefix == 0:
        return tensor[:, :, first:last]
    return torch.cat([tensor[:, :, :prefix], tensor[:, :, prefix + first : prefix + last]], dim=2)


def _local(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    form: Form,
    out: torch.Tensor,
    mass: torch.Tensor,
) -> None:
    """Fill in the image rows of the near part."""
    for rows, first, last in windows(query.shape[2] - form.prefix, form):
        some = slice(form.prefix + rows.start, form.prefix + rows.stop)
        out[:, :, some], mass[:, :, some] = attend_with_mass(
            query[:, :, some],
            _near(key, form.prefix, first, last),
            _near(value, form.prefix, first, last),
            scale,
        )


def _groups(value: torch.Tensor, form: Form, size: int) -> Iterator[tuple[slice, slice]]:
    """Batch rows and heads whose sums and copies are held at a time."""
    batch, heads, tokens, value_dim = value.shape
    held = size * _held(tokens, value_dim, form)
    return kernel.head_groups(batch, heads, held, kernel.budget(value.device).heads)


def _held(tokens: int, value_dim: int, form: Form) -> int:
    """Numbers that a head's sums and copies are, about."""
    features = feature_dim(form.rank, form.terms)
    held = 3 * features * (value_dim + 1) + 3 * form.chunk * features
    return held + tokens * (3 * value_dim + 2 * form.rank + 1)


def heads_at_a_time(
    batch: int,
    heads: int,
    tokens: int,
    value_dim: int,
    form: Form,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """How many heads of how many pictures are in few coordinates at a time.

    Args:
        batch: B.
        heads: H.
        tokens: that the global part sees.
        value_dim: Dv.
        form: of the call.
        dtype: of the input.
        device: where.
    """
    size = kernel.accumulation_dtype(dtype).itemsize
    held = size * _held(tokens, value_dim, form)
    rows, some = next(kernel.head_groups(batch, heads, held, kernel.budget(device).heads))
    count: int = (rows.stop - rows.start) * (some.stop - some.start)
    return count


def _join(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    tokens: Tokens,
    form: Form,
    find_basis: FindBasis,
    out: torch.Tensor,
    mass: torch.Tensor,
) -> Attended:
    """Near and far as one softmax: numerators and denominators of both, divided once."""
    prefix, dtype = form.prefix, mass.dtype
    log_weight = torch.full((), form.weight, dtype=dtype, device=query.device).log()
    least, bad, count = [], [], 0
    for batch, heads, low in _lowered(tokens, form, find_basis, dtype):
        sums: FarSums | None = None
        for rows, first, last in windows(query.shape[2] - prefix, form):
            some = slice(prefix + rows.start, prefix + rows.stop)
            exact, near_mass = attend_with_mass(
                query[batch, heads, some],
                _near(key[batch, heads], prefix, first, last),
                _near(value[batch, heads], prefix, first, last),
                scale,
            )
            if sums is None:
                sums = FarSums(low, form.terms, first, last, form.chunk)
            else:
                sums.move(first, last)
            if sums.empty:
                out[batch, heads, some], mass[batch, heads, some] = exact, near_mass
                continue
            far = sums.block(rows, form.eps)
            far_mass = far.log_mass + log_weight
            share = torch.sigmoid(far_mass - near_mass)[..., None]
            wide = exact.to(dtype)
            out[batch, heads, some] = wide + share * (far.out - wide)
            mass[batch, heads, some] = torch.logaddexp(near_mass, far_mass)
            least.append(far.relative.min())
            bad.append((~(far.relative > form.eps)).sum())
            count += far.relative.numel()
        # Or they would be held while those of the next heads are made.
        del low, sums
    if not count:
        return Attended(out, mass, None, None)
    return Attended(out, mass, torch.stack(least).min(), torch.stack(bad).sum().float() / count)


def _lowered(
    tokens: Tokens, form: Form, find_basis: FindBasis, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Low]]:
    """Pictures and heads, some at a time, in few coordinates."""
    narrow = dtype if form.wide else tokens.query.dtype
    basis = find_basis(tokens.query, tokens.key, tokens.mean, narrow)
    for batch, heads in _groups(tokens.value, form, dtype.itemsize):
        some = Basis(basis.of_query[:, heads], basis.of_key[:, heads], basis.fitted)
        yield batch, heads, lower(tokens.of(batch, heads), form.scale, some, form.norm, narrow)


def _add_global(out: torch.Tensor, tokens: Tokens, form: Form, find_basis: FindBasis) -> Attended:
    """Add a second attention, over all tokens and divided by itself, to the local one."""
    dtype = kernel.accumulation_dtype(out.dtype)
    least, bad, count = [], [], 0
    for batch, heads, low in _lowered(tokens, form, find_basis, dtype):
        weights = low.values[..., -1]
        # The values carry their weights already; the kernel is to weigh the monomials alone.
        both, _ = kernel.sums(low.query, low.key, low.values, form.terms)
        relative = both[..., -1:] / weights.to(dtype).sum(dim=-1)[..., None, None]
        good = relative > form.eps
        divided = both[..., :-1] / torch.where(good, both[..., -1:], 1.0)
        part = out[batch, heads]
        # In place, in the wide dtype: the sum of two parts is rounded once.
        part.copy_(part.to(dtype) + form.weight * torch.where(good, divided, 0.0))
        least.append(relative.min())
        bad.append((~good).sum())
        count += good.numel()
        # Or they would be held while those of the next heads are made.
        del low, weights, both, relative, good, divided, part
    return Attended(out, None, torch.stack(least).min(), torch.stack(bad).sum().float() / count)
