"""Monomials by their rank, made on the device: the combinatorial number system.

A monomial of degree below P over d coordinates is a multiset of P - 1 symbols out of d + 1,
where the extra symbol stands for the constant 1. Multisets of size m out of n symbols match the
sets ``c₁ < … < c_m`` out of n + m - 1 numbers by ``c_j = e_j + j - 1``, and a set's rank is
``Σ_j C(c_j, j)`` (D. E. Knuth, The Art of Computer Programming 4A, 7.2.1.3). So any range of
ranks becomes monomials without a list of those before it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch


@lru_cache(maxsize=32)
def _binomials(head_dim: int, terms: int, device: torch.device) -> torch.Tensor:
    """``[P - 1, d + P]`` int64: C(c, j) in row j - 1."""
    size = terms - 1
    rows = [[math.comb(c, j) for c in range(head_dim + terms)] for j in range(1, size + 1)]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64).to(device)


def unrank(
    start: int, count: int, head_dim: int, terms: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Monomials of ranks ``start`` to ``start + count``, of degree below ``terms``.

    Args:
        start: first rank.
        count: ranks; those from R = C(d + P - 1, P - 1) on get weight 0.
        head_dim: d.
        terms: P, 2 or more.
        device: where the result is made; only a table of binomials, once, comes from the host.

    Returns:
        Coordinates ``[P - 1, count]`` int32, ascending along the first dimension, with d for
        the constant 1; and 1/α! ``[count]`` fp32.
    """
    table = _binomials(head_dim, terms, device)
    total = math.comb(head_dim + terms - 1, terms - 1)
    ranks = torch.arange(start, start + count, device=device, dtype=torch.int64)
    live = ranks < total
    rest = torch.where(live, ranks, 0)
    coordinates = torch.empty(terms - 1, count, dtype=torch.int32, device=device)
    for size in range(terms - 1, 0, -1):
        row = table[size - 1]
        # The largest c with C(c, size) <= rest.
        number = torch.searchsorted(row, rest, right=True) - 1
        rest = rest - row[number]
        coordinates[size - 1] = (number - (size - 1)).to(torch.int32)
    weights = torch.ones(count, dtype=torch.float32, device=device)
    run = torch.ones_like(weights)
    for position in range(1, terms - 1):
        same = coordinates[position] == coordinates[position - 1]
        run = torch.where(same & (coordinates[position] < head_dim), run + 1.0, 1.0)
        weights = weights / run
    return coordinates, torch.where(live, weights, 0.0)
