"""The sums of Taylor attention without features, from the logits: for a few queries.

``Σ_{p < P} xᵖ / p!`` with x = q·k is what the features expand, so both give the same numbers up to
rounding. Logits cost Nq · Nk products where features cost (Nq + Nk) · R: they win where queries
are few, and Triton's paths, made for many queries, can't.
"""

from __future__ import annotations

import torch

from . import kernel
from .features import feature_dim


def is_cheaper(queries: int, keys: int, head_dim: int, value_dim: int, terms: int) -> bool:
    """Whether the logits take fewer multiplications than the features.

    Args:
        queries: Nq.
        keys: Nk.
        head_dim: d of one expansion.
        value_dim: Dv.
        terms: P.
    """
    columns = value_dim + 1
    from_logits = queries * keys * (head_dim + terms + columns)
    # A feature is one product, and meets every column once.
    return from_logits < (queries + keys) * feature_dim(head_dim, terms) * (1 + columns)


def _series(logits: torch.Tensor, terms: int, constant: bool) -> torch.Tensor:
    """Horner's scheme over ``logits``, whose memory the result does not share."""
    if terms == 1:
        return torch.full_like(logits, float(constant))
    found = logits / (terms - 1)
    for power in range(terms - 2, 0, -1):
        found.add_(1.0).mul_(logits).div_(power)
    return found.add_(1.0) if constant else found


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
    """As `kernel.sums`; ``block_k`` has no meaning here."""
    dtype = kernel.accumulation_dtype(query.dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    batch, heads, queries, _ = query.shape
    numerator = value.new_empty(batch, heads, queries, value.shape[3])
    denominator = value.new_empty(batch, heads, queries, 1)
    row_bytes = 2 * batch * heads * key.shape[2] * dtype.itemsize
    rows = block_q or max(1, kernel.budget(query.device).block // row_bytes)
    for start in range(0, queries, rows):
        chosen = slice(start, start + rows)
        logits = torch.matmul(query[:, :, chosen], key.transpose(-2, -1))
        series = _series(logits, terms, constant)
        if weights is not None:
            series *= weights.to(dtype)[:, :, None]
        numerator[:, :, chosen] = torch.matmul(series, value)
        denominator[:, :, chosen] = series.sum(dim=-1, keepdim=True)
    return numerator, denominator
