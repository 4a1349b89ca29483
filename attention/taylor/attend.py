"""Taylor attention of whole heads: centring, projection, sub-head blocks, sums, division."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from . import blocks, kernel
from .centring import Centred, centre
from .mass import log_mass
from .projection import factors


@dataclass(frozen=True, slots=True)
class Options:
    """How the expansion is prepared; see `settings.TaylorSettings` for the meaning of each."""

    sub_head_blocks: int = 1
    sub_head_mode: blocks.Mode = "shared"
    centre_keys: bool = True
    centre_queries: bool = True
    centre_values: bool = True
    feature_projection: int = 0
    block_q: int = 0
    block_k: int = 0
    round_denominators: bool = False
    """To the dtype of the query, as attention in half precision does."""

    @property
    def heads_per_head(self) -> int:
        """How many attentions a head is split into."""
        return self.sub_head_blocks if self.sub_head_mode == "independent" else 1

    def feature_width(self, head_dim: int) -> int:
        """Coordinates of one expansion.

        Raises:
            ValueError: ``sub_head_blocks`` doesn't divide the head or what is left of it.
        """
        blocks.check(head_dim, self.sub_head_blocks, "head_dim")
        width = head_dim // self.heads_per_head
        if 0 < self.feature_projection < width:
            width = self.feature_projection
        if self.sub_head_mode == "shared":
            blocks.check(width, self.sub_head_blocks, "feature_projection")
            width //= self.sub_head_blocks
        return width


@dataclass(frozen=True, slots=True)
class Attended:
    """Outcome of one call.

    Attributes:
        out: ``[B, H, Nq, Dv]`` in the query's dtype.
        denominator: ``[B, H · heads_per_head, Nq, 1]`` float32 (float64 for float64 input), over
            the sum of the key weights: what exp averages to, 1 where all logits are 0.
        log_mass: ``[B, H, S]`` float32, see `log_mass`; None where it wasn't asked for.
    """

    out: torch.Tensor
    denominator: torch.Tensor
    log_mass: torch.Tensor | None = None


@runtime_checkable
class WholeHeads(Protocol):
    """Sums that can also do a whole call: preparation, sums and division in fewer passes."""

    def takes_whole(self, terms: int, options: Options) -> bool:
        """Whether `whole` can take calls without weights that have these options."""

    def whole(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        terms: int,
        options: Options,
        eps: float,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """`taylor_attention` into ``out``; returns its denominators, in float32."""

    def whole_bytes(self, queries: int, keys: int, head_dim: int, options: Options) -> int:
        """Bytes of the copies of one head that `whole` holds, value as wide as key."""


def rounded(denominator: torch.Tensor, dtype: torch.dtype, options: Options) -> torch.Tensor:
    """Denominators as they are tested and divided by; their dtype stays."""
    if not options.round_denominators:
        return denominator
    return denominator.to(dtype).to(denominator.dtype)


def head_bytes(
    queries: int, keys: int, head_dim: int, value_dim: int, options: Options, size: int
) -> int:
    """Bytes of the copies of one head that are held while its sums are computed."""
    parts = options.heads_per_head
    width = head_dim
    if 0 < options.feature_projection < head_dim // parts:
        width = options.feature_projection * parts
    shared = options.sub_head_mode == "shared" and options.sub_head_blocks > 1
    columns = value_dim + parts
    prepared = (queries + keys) * width + keys * (value_dim + parts)
    summed = keys * columns + queries * columns
    if shared:
        # The sums of the blocks before, and one block of query and key in one piece.
        summed += queries * columns + (queries + keys) * width // options.sub_head_blocks
    return size * (prepared + summed)


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    weights: torch.Tensor | None,
    options: Options,
) -> Centred:
    """Fold the scale in, split into independent blocks, centre, project.

    Args:
        query: ``[B, H, Nq, D]``, any floating dtype.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, Dv]``.
        scale: factor on q·k of a whole head; may be negative.
        weights: ``[B or 1, H or 1, Nk]``; None for 1.
        options: see `Options`.

    Returns:
        Tensors in float32 (float64 for float64 input) with ``H · heads_per_head`` heads and the
        width of the expansions times the shared blocks, feature-major in memory.
    """
    dtype = kernel.accumulation_dtype(query.dtype)
    parts = options.heads_per_head
    # (D/B)^-½ in place of D^-½. Half of the scale on either side keeps both near 1.
    root = (abs(scale) * parts**0.5) ** 0.5

    def lay(x: torch.Tensor, factor: float) -> torch.Tensor:
        rows, some, tokens, width = x.shape
        copy = x.new_empty(rows, some, width, tokens, dtype=dtype).copy_(x.transpose(2, 3))
        if factor != 1.0:
            copy *= factor
        return blocks.split(copy.transpose(2, 3), parts)

    if weights is not None and weights.shape[1] != 1 and parts > 1:
        weights = weights.repeat_interleave(parts, dim=1)
    centred = centre(
        lay(query, root if scale >= 0 else -root),
        lay(key, root),
        lay(value, 1.0),
        weights,
        queries=options.centre_queries,
        keys=options.centre_keys,
        values=options.centre_values,
    )
    if not 0 < options.feature_projection < centred.query.shape[-1]:
        return centred
    a, b = factors(centred.query, centred.key, centred.weights, options.feature_projection)
    # Products in this order come out feature-major.
    return Centred(
        torch.matmul(a.transpose(-2, -1), centred.query.transpose(-2, -1)).transpose(-2, -1),
        torch.matmul(b.transpose(-2, -1), centred.key.transpose(-2, -1)).transpose(-2, -1),
        centred.value,
        centred.weights,
        centred.value_mean,
        centred.key_mean,
        centred.log_factor,
    )


def _attend_some(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    terms: int,
    weights: torch.Tensor | None,
    options: Options,
    eps: float,
    sums: blocks.Sums,
    log_mass_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`taylor_attention` of a few heads, not yet merged: output, denominators, log mass."""
    ready = prepare(query, key, value, scale, weights, options)
    numerator, denominator = blocks.shared_sums(
        sums,
        ready.query,
        ready.key,
        ready.value,
        terms,
        1 if options.sub_head_mode == "independent" else options.sub_head_blocks,
        weights=ready.weights,
        block_q=options.block_q,
        block_k=options.block_k,
    )
    mass: torch.Tensor | float = float(key.shape[2])
    if ready.weights is not None:
        mass = ready.weights.sum(dim=-1)[:, :, None, None]
    # A head without a live key gives 0/0 here and so counts as bad.
    denominator = rounded(denominator / mass, query.dtype, options)
    numerator = numerator.div_(denominator.clamp_min(eps) * mass)
    if ready.value_mean is not None:
        numerator = numerator.add_(ready.value_mean)
    if log_mass_rows is None:
        return numerator, denominator, None
    rows = query.index_select(2, log_mass_rows)
    series = denominator.index_select(2, log_mass_rows)
    return numerator, denominator, log_mass(series, mass, rows, scale, ready, eps)


@torch.no_grad()
def taylor_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    terms: int,
    *,
    weights: torch.Tensor | None = None,
    options: Options | None = None,
    eps: float = 1e-6,
    sums: blocks.Sums = kernel.sums,
    log_mass_rows: torch.Tensor | None = None,
) -> Attended:
    """Attention with exp replaced by its first ``terms`` terms, a few heads at a time.

    Args:
        query: ``[B, H, Nq, D]``, any floating dtype.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, Dv]``.
        scale: factor on q·k; may be negative.
        terms: P, from 1 to 8; the degree is P - 1.
        weights: ``[B or 1, H or 1, Nk]``, a factor on each key's term; None for 1. A key whose
            weight is 0 may hold anything.
        options: centring, projection, blocks; their defaults where left out.
        eps: least denominator by which is divided, relative to the sum of the key weights.
        sums: what computes the sums.
        log_mass_rows: ``[S]`` int64, queries whose log mass is wanted; None for none. Independent
            blocks have a denominator each, and none that stands for the whole head: they give no
            log mass.

    Raises:
        ValueError: ``terms`` or the sub-head blocks don't fit.
    """
    options = options or Options()
    batch, heads, queries, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    options.feature_width(head_dim)
    dtype, parts = kernel.accumulation_dtype(query.dtype), options.heads_per_head
    out = query.new_empty(batch, heads, queries, value_dim)
    denominators = query.new_empty(batch, heads * parts, queries, 1, dtype=dtype)
    whole = None
    if weights is None and isinstance(sums, WholeHeads) and sums.takes_whole(terms, options):
        whole = sums
        per_head = whole.whole_bytes(queries, keys, max(head_dim, value_dim), options)
    else:
        per_head = head_bytes(queries, keys, head_dim, value_dim, options, dtype.itemsize)
    limit = kernel.budget(query.device).heads
    masses = None
    if parts > 1:
        log_mass_rows = None
    elif log_mass_rows is not None:
        masses = query.new_empty(batch, heads, log_mass_rows.shape[0], dtype=torch.float32)
    for rows, some in kernel.head_groups(batch, heads, per_head, limit):
        split_heads = slice(some.start * parts, some.stop * parts)
        if whole is not None:
            denominators[rows, split_heads] = whole.whole(
                query[rows, some],
                key[rows, some],
                value[rows, some],
                scale,
                terms,
                options,
                eps,
                out[rows, some],
            )
            continue
        chosen = weights
        if weights is not None:
            chosen = weights[rows if weights.shape[0] > 1 else slice(None)]
            chosen = chosen[:, some if weights.shape[1] > 1 else slice(None)]
        numerator, denominator, mass = _attend_some(
            query[rows, some],
            key[rows, some],
            value[rows, some],
            scale,
            terms,
            chosen,
            options,
            eps,
            sums,
            log_mass_rows,
        )
        out[rows, some] = blocks.merge(numerator, parts)
        denominators[rows, split_heads] = denominator
        if masses is not None and mass is not None:
            masses[rows, some] = mass
        # The next heads' copies come before these names are taken again.
        del numerator, denominator
    return Attended(out, denominators, masses)
