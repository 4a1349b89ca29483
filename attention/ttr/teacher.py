"""What exact attention says of some queries beside its output."""

from __future__ import annotations

import torch

from ..quality import product

_CHUNK_BYTES = 64 * 2**20
"""Logits held at a time."""


@torch.no_grad()
def log_mass(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """logsumexp of the scaled logits of some queries, a few heads and queries at a time.

    Products of bfloat16 on CUDA are of bfloat16 with sums in float32; everything else is float32.

    Args:
        query: ``[B, H, S, D]``, in the key's dtype.
        key: ``[B, H, N, D]``.
        scale: factor on q·k.

    Returns:
        ``[B, H, S]`` float32.
    """
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, heads, queries, dtype=torch.float32)
    row = 4 * batch * key.shape[2]
    some = max(1, min(queries, _CHUNK_BYTES // row))
    step = max(1, min(heads, _CHUNK_BYTES // (row * some)))
    for head in range(0, heads, step):
        keys = key[:, head : head + step].transpose(-2, -1)
        for first in range(0, queries, some):
            rows = query[:, head : head + step, first : first + some]
            logits = product(rows, keys).mul_(scale)
            out[:, head : head + step, first : first + some] = logits.logsumexp(dim=-1)
    return out
