"""Denominators of a few queries, before the sums over the values are made.

Few queries need no features: their logits with all keys are a small part of the work, on any
device (`direct`). Where that is not so, the denominator still takes one sum per feature only,
where the numerator takes one per feature and value.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..quality import sampled_indices
from . import blocks, direct, kernel
from .attend import Options, head_bytes, prepare, rounded

_LEAST = {1: 1.0, 3: 0.5, 5: 0.2703, 7: 0.1493}
"""Least value, rounded down, of the first P terms of exp: ``x^(P-1)/(P-1)!`` at the root of the
first P - 1 terms, where the derivative vanishes."""


def least_denominator(terms: int, options: Options) -> float:
    """Least value that a relative denominator can have, whatever query and key hold.

    A denominator is a weighted mean of the series' values. Shared blocks add the series of B
    slices and count degree 0 once, so their least value is ``1 - B (1 - least)``.

    Returns:
        The bound; minus infinity for an even P, whose series has none.
    """
    if terms not in _LEAST:
        return float("-inf")
    slices = options.sub_head_blocks if options.sub_head_mode == "shared" else 1
    return 1.0 - slices * (1.0 - _LEAST[terms])


@torch.no_grad()
def probe_denominators(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    terms: int,
    samples: int,
    *,
    weights: torch.Tensor | None = None,
    options: Options | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Relative denominators of some queries, as `attend.taylor_attention` would give them.

    Args:
        query: ``[B, H, Nq, D]``, any floating dtype.
        key: ``[B, H, Nk, D]``.
        scale: factor on q·k.
        terms: P.
        samples: how many queries, spread over the sequence.
        weights: ``[B or 1, H or 1, Nk]``, a factor on each key's term; None for 1.
        options: of the expansion.
        seed: of the choice of queries.

    Returns:
        ``[B, H · heads_per_head, S, 1]``, float32 (float64 for float64 input).
    """
    options = replace(options or Options(), centre_values=False)
    batch, heads, queries, head_dim = query.shape
    keys, dtype = key.shape[2], kernel.accumulation_dtype(query.dtype)
    rows = sampled_indices(queries, samples, seed, query.device)
    nothing = key.new_empty(batch, heads, keys, 0)
    width = options.feature_width(head_dim)
    few = direct.is_cheaper(rows.numel(), keys, width, 0, terms)
    sums: blocks.Sums = direct.sums if few else kernel.sums
    per_head = head_bytes(queries, keys, head_dim, 0, options, dtype.itemsize)
    found: dict[int, list[torch.Tensor]] = {}
    for some_rows, some in kernel.head_groups(
        batch, heads, per_head, kernel.budget(query.device).heads
    ):
        chosen = weights
        if weights is not None:
            chosen = weights[some_rows if weights.shape[0] > 1 else slice(None)]
            chosen = chosen[:, some if weights.shape[1] > 1 else slice(None)]
        ready = prepare(
            query[some_rows, some], key[some_rows, some], nothing[some_rows, some],
            scale, chosen, options,
        )  # fmt: skip
        _, denominator = blocks.shared_sums(
            sums,
            ready.query.index_select(2, rows),
            ready.key,
            ready.value,
            terms,
            1 if options.sub_head_mode == "independent" else options.sub_head_blocks,
            weights=ready.weights,
            block_q=options.block_q,
            block_k=options.block_k,
        )
        mass: torch.Tensor | float = float(keys)
        if ready.weights is not None:
            mass = ready.weights.sum(dim=-1)[:, :, None, None]
        found.setdefault(some_rows.start, []).append(
            rounded(denominator / mass, query.dtype, options)
        )
    return torch.cat([torch.cat(parts, dim=1) for parts in found.values()], dim=0)
