"""Monomial features of a truncated exponential, over unique multisets of coordinates.

With ``q·k = Σᵢ qᵢkᵢ`` the multinomial theorem gives
``exp(q·k) ≈ Σ_{|α| < P} q^α k^α / α!``: one feature per multiset α, weighted by 1/α!.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def feature_dim(head_dim: int, terms: int) -> int:
    """Number R of unique monomials of degree below ``terms``: C(head_dim + P - 1, P - 1)."""
    return math.comb(head_dim + terms - 1, terms - 1)


def degree_dim(head_dim: int, degree: int) -> int:
    """Number of unique monomials of one degree: C(head_dim + degree - 1, degree)."""
    return math.comb(head_dim + degree - 1, degree)


def _suffix_start(head_dim: int, degree: int, coordinate: int) -> int:
    """Where the monomials of ``degree`` start that use coordinates from ``coordinate`` on."""
    return degree_dim(head_dim, degree) - degree_dim(head_dim - coordinate, degree)


def next_degree(x: torch.Tensor, previous: torch.Tensor, degree: int) -> torch.Tensor:
    """Monomials of ``degree`` from those of ``degree - 1``.

    Monomials are in lexicographic order of their sorted coordinates. Those that start with
    coordinate i are ``xᵢ`` times the monomials one degree lower that use coordinates ≥ i, and
    these are a suffix: slices and products build everything, nothing is gathered.

    Args:
        x: ``[..., N, d]``.
        previous: ``[..., N, C(d + degree - 2, degree - 1)]``.
        degree: 1 or more.

    Returns:
        ``[..., N, C(d + degree - 1, degree)]``.
    """
    head_dim = x.shape[-1]
    if degree == 1:
        return x
    out = x.new_empty(*x.shape[:-1], degree_dim(head_dim, degree))
    filled = 0
    for coordinate in range(head_dim):
        suffix = previous[..., _suffix_start(head_dim, degree - 1, coordinate) :]
        width = suffix.shape[-1]
        torch.mul(
            x[..., coordinate : coordinate + 1], suffix, out=out[..., filled : filled + width]
        )
        filled += width
    return out


@lru_cache(maxsize=32)
def multiplicity_weights(head_dim: int, degree: int) -> torch.Tensor:
    """1/α! of each monomial of one degree, in the order of `next_degree`.

    Returns:
        ``[C(head_dim + degree - 1, degree)]`` float64, on the CPU.
    """
    with torch.inference_mode(False):
        weights = torch.ones(1, dtype=torch.float64)
        leading = torch.zeros(1, dtype=torch.float64)
        for current in range(1, degree + 1):
            parts_w, parts_l = [], []
            for coordinate in range(head_dim):
                start = _suffix_start(head_dim, current - 1, coordinate) if current > 1 else 0
                suffix_w = weights[start:]
                repeated = torch.zeros_like(suffix_w)
                if current > 1:
                    # The first monomials of the suffix start with this very coordinate.
                    same = degree_dim(head_dim - coordinate, current - 1) - (
                        degree_dim(head_dim - coordinate - 1, current - 1)
                        if coordinate + 1 < head_dim
                        else 0
                    )
                    repeated[:same] = leading[start : start + same]
                parts_w.append(suffix_w / (repeated + 1.0))
                parts_l.append(repeated + 1.0)
            weights, leading = torch.cat(parts_w), torch.cat(parts_l)
        return weights
