"""The softmax mass that Taylor attention stands for: what its denominator says of it."""

from __future__ import annotations

import math

import torch

from ..quality import product
from . import centring


def log_mass(
    denominator: torch.Tensor,
    rows: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    centre_queries: bool,
    centre_keys: bool,
    eps: float,
) -> torch.Tensor:
    """Log of the approximated Σⱼ exp(scale·q·kⱼ + maskⱼ), comparable to a logsumexp of logits.

    With q̄ and k̄ the means that were taken out (0 where none was),

    ``q·k = (q - q̄)·(k - k̄) + q̄·(k - k̄) + q·k̄``.

    The series stands for the first part, the key weights for the second, and the third is common
    to all keys of a query. The denominator is relative to the sum of the weights, so
    ``log(denominator) + logsumexpⱼ(q̄·(kⱼ - k̄) + maskⱼ) + q·k̄`` is the log mass.

    Only the means and ``q̄·kⱼ`` look at whole sequences.

    Args:
        denominator: ``[B, H, Nq, 1]``, see `attend.Attended`; divided by no less than ``eps``.
        rows: ``[S]`` int64, the queries whose mass is wanted.
        query: ``[B, H, Nq, D]``, any floating dtype.
        key: ``[B, H, Nk, D]``. What is masked may hold NaN.
        scale: factor on q·k, ``scale_mul`` included.
        mask: four-dimensional, the same for every query, see ``masks``; None for none.
        weights: what ``masks.key_weights`` makes of the mask; None for none.
        centre_queries: whether q̄ was taken out.
        centre_keys: whether k̄ was taken out.
        eps: least denominator.

    Returns:
        ``[B, H, S]`` float32.
    """
    bias: torch.Tensor | None = None
    if mask is not None and weights is not None:
        # A mask may have one row for all heads, whose keys it adds to alike.
        row = mask[:, :, 0, :]
        weights = weights.float()
        bias = weights.log() if row.dtype == torch.bool else row.float()
        key = key.float().masked_fill((weights == 0)[..., None], 0.0)
    common: torch.Tensor | float = 0.0
    key_mean = None
    if centre_keys:
        key_mean = (
            key.mean(dim=2, keepdim=True, dtype=torch.float32)
            if weights is None
            else centring.mean(key, weights)
        )
        some = query.index_select(2, rows).float()
        common = torch.matmul(some, key_mean.transpose(-2, -1)).squeeze(-1) * scale
    if centre_queries:
        query_mean = query.mean(dim=2, keepdim=True, dtype=torch.float32) * scale
        exponent = _against(query_mean, key)
        if key_mean is not None:
            # Taken from the product rather than from the keys, which would be copied for it.
            exponent -= torch.matmul(query_mean, key_mean.transpose(-2, -1)).squeeze(-1)
        bias = exponent if bias is None else exponent + bias
    total: torch.Tensor | float = math.log(key.shape[2])
    if bias is not None:
        total = torch.logsumexp(bias, dim=-1, keepdim=True)
    series = denominator.index_select(2, rows).float().clamp_min(eps).log().squeeze(-1)
    return series + total + common


def _against(row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``row·kⱼ``, ``[B, H, Nk]`` float32, of a float32 row ``[B, H, 1, D]``.

    A product may round the row to a key of half precision. Two rows, one of what the other lacks,
    keep twice the digits.
    """
    if key.dtype != torch.float32:
        high = row.to(key.dtype).float()
        row = torch.cat([high, row - high], dim=2)
    return product(row, key.transpose(-2, -1)).sum(dim=2)
