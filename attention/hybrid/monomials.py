"""Unique monomials with the features in the last dimension, few kernels for small blocks."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..taylor.features import degree_dim, suffix_start


@lru_cache(maxsize=32)
def _factors(width: int, degree: int, device: torch.device) -> torch.Tensor:
    """Of each monomial: a coordinate, and the monomial one degree lower that it multiplies."""
    with torch.inference_mode(False):
        lower = degree_dim(width, degree - 1)
        pairs = [
            torch.stack([torch.full((lower - start,), i), torch.arange(start, lower)])
            for i in range(width)
            for start in (suffix_start(width, degree - 1, i),)
        ]
        return torch.cat(pairs, dim=1).to(device)


def monomials(x: torch.Tensor, terms: int) -> torch.Tensor:
    """All monomials of degree below ``terms``, in the order of `taylor.features.base_weights`.

    Args:
        x: ``[..., N, r]``.
        terms: P, 1 or more.

    Returns:
        ``[..., N, C(r + P - 1, P - 1)]`` in the dtype of ``x``.
    """
    parts = [x.new_ones(*x.shape[:-1], 1)]
    if terms > 1:
        parts.append(x)
    for degree in range(2, terms):
        coordinate, lower = _factors(x.shape[-1], degree, x.device)
        parts.append(x[..., coordinate] * parts[-1][..., lower])
    return torch.cat(parts, dim=-1)
