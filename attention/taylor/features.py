"""Monomial features of a truncated exponential, over unique multisets of coordinates.

With ``q·k = Σᵢ qᵢkᵢ`` the multinomial theorem gives
``exp(q·k) ≈ Σ_{|α| < P} q^α k^α / α!``: one feature per multiset α, weighted by 1/α!.

Tensors of features are feature-major, ``[..., features, tokens]``: the features that share a
coordinate are then contiguous, so that slices and products build everything and every product
runs along the tokens. Nothing is gathered.

Two orders of the monomials of one degree occur, both of their sorted coordinates:
*lexicographic*, where those with no coordinate below i are a suffix, and *colexicographic*
(by the last coordinate first), where those with no coordinate above j are a prefix.
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
    return math.comb(head_dim + degree - 1, degree) if head_dim + degree else 1


def suffix_start(head_dim: int, degree: int, coordinate: int) -> int:
    """Where the lexicographic monomials start that use coordinates from ``coordinate`` on."""
    return degree_dim(head_dim, degree) - degree_dim(head_dim - coordinate, degree)


def next_degree(
    x: torch.Tensor, previous: torch.Tensor, degree: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Lexicographic monomials of ``degree`` from those of ``degree - 1``.

    Those that start with coordinate i are ``xᵢ`` times the suffix of the monomials one degree
    lower that use coordinates from i on.

    Args:
        x: ``[..., d, N]``.
        previous: ``[..., C(d + degree - 2, degree - 1), N]``.
        degree: 1 or more.
        out: where to write; a new tensor where left out.

    Returns:
        ``[..., C(d + degree - 1, degree), N]``.
    """
    head_dim = x.shape[-2]
    if out is None:
        out = x.new_empty(*x.shape[:-2], degree_dim(head_dim, degree), x.shape[-1])
    if degree == 1:
        return out.copy_(x)
    filled = 0
    for coordinate in range(head_dim):
        suffix = previous[..., suffix_start(head_dim, degree - 1, coordinate) :, :]
        width = suffix.shape[-2]
        torch.mul(
            x[..., coordinate : coordinate + 1, :],
            suffix,
            out=out[..., filled : filled + width, :],
        )
        filled += width
    return out


def next_lead_degree(
    x: torch.Tensor, previous: torch.Tensor, degree: int, out: torch.Tensor
) -> torch.Tensor:
    """Colexicographic monomials of ``degree`` from those of ``degree - 1``.

    Those that end with coordinate j are ``xⱼ`` times the prefix of the monomials one degree lower
    that use coordinates up to j. Shapes as in `next_degree`.
    """
    filled = 0
    for coordinate in range(x.shape[-2]):
        width = degree_dim(coordinate + 1, degree - 1)
        torch.mul(
            x[..., coordinate : coordinate + 1, :],
            previous[..., :width, :],
            out=out[..., filled : filled + width, :],
        )
        filled += width
    return out


@lru_cache(maxsize=64)
def _lexicographic(head_dim: int, degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1/α! of each lexicographic monomial, and how often its first coordinate occurs. float64."""
    with torch.inference_mode(False):
        if degree == 0:
            return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        weights, leading = _lexicographic(head_dim, degree - 1)
        parts_w, parts_l = [], []
        for coordinate in range(head_dim):
            start = suffix_start(head_dim, degree - 1, coordinate)
            # The first monomials of the suffix start with this very coordinate.
            same = starting_with(head_dim, degree - 1, coordinate)
            count = torch.zeros_like(weights[start:])
            count[:same] = leading[start : start + same]
            parts_w.append(weights[start:] / (count + 1.0))
            parts_l.append(count + 1.0)
        return torch.cat(parts_w), torch.cat(parts_l)


@lru_cache(maxsize=64)
def _colexicographic(head_dim: int, degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1/α! of each colexicographic monomial, and how often its last coordinate occurs."""
    with torch.inference_mode(False):
        if degree == 0:
            return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        weights, trailing = _colexicographic(head_dim, degree - 1)
        parts_w, parts_t = [], []
        for coordinate in range(head_dim):
            width = degree_dim(coordinate + 1, degree - 1)
            count = trailing[:width].clone()
            # The last monomials of the prefix end with this very coordinate.
            count[: degree_dim(coordinate, degree - 1)] = 0.0
            parts_w.append(weights[:width] / (count + 1.0))
            parts_t.append(count + 1.0)
        return torch.cat(parts_w), torch.cat(parts_t)


def starting_with(head_dim: int, degree: int, coordinate: int) -> int:
    """Number of lexicographic monomials of ``degree`` whose first coordinate is this one."""
    if degree == 0:
        return 0
    return degree_dim(head_dim - coordinate, degree - 1)


def multiplicity_weights(head_dim: int, degree: int) -> torch.Tensor:
    """1/α! of each monomial of one degree, in the order of `next_degree`.

    Returns:
        ``[C(head_dim + degree - 1, degree)]`` float64, on the CPU. Shared: not to be changed.
    """
    return _lexicographic(head_dim, degree)[0]


@lru_cache(maxsize=64)
def base_weights(
    head_dim: int, degree: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """`multiplicity_weights` of all degrees up to ``degree``, kept on the device.

    Copying them at each call would wait for all that runs on a GPU.
    """
    with torch.inference_mode(False):
        parts = [multiplicity_weights(head_dim, below) for below in range(degree + 1)]
        return torch.cat(parts).to(device, dtype)


@lru_cache(maxsize=64)
def _factors(
    head_dim: int, lead: int, tail: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, trailing counts and leading counts for `product_weights`, kept on the device."""
    with torch.inference_mode(False):
        lead_weights, trailing = _colexicographic(head_dim, lead)
        tail_weights, leading = _lexicographic(head_dim, tail)
        # 1/C(m + n, m) for the m trailing and n leading occurrences of one coordinate.
        merged = torch.tensor(
            [[1.0 / math.comb(m + n, m) for n in range(tail + 1)] for m in range(lead + 2)],
            dtype=torch.float64,
        )
        lead_side = torch.stack([lead_weights, trailing], 1).to(device, dtype)
        tail_side = torch.stack([tail_weights, leading], 1).to(device, dtype)
        return lead_side, tail_side, merged.to(device, dtype)


def product_weights(
    head_dim: int,
    lead: int,
    tail: int,
    coordinate: int,
    leads: slice,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """1/α! of products of lead monomials that end with a coordinate and tails from it on.

    A lead is ``x_coordinate`` times one of the colexicographic monomials of degree ``lead - 1``;
    a tail is a lexicographic monomial of degree ``tail`` without a coordinate below.

    Args:
        head_dim: d.
        lead: degree of the leads, 1 or more.
        tail: degree of the tails, 1 or more.
        coordinate: the last of the leads, and the least of the tails.
        leads: which of the ``C(coordinate + lead - 1, lead - 1)`` leads.
        device: of the answer.
        dtype: of the answer.

    Returns:
        ``[leads, tails]``.
    """
    lead_side, tail_side, merged = _factors(head_dim, lead - 1, tail, device, dtype)
    trailing = lead_side[leads, 1].clone()
    # Of the prefix only what lies behind this row ends with the coordinate already.
    ends_before = degree_dim(coordinate, lead - 1)
    trailing[: max(0, min(ends_before - leads.start, trailing.shape[0]))] = 0.0
    trailing += 1.0
    tails = tail_side[suffix_start(head_dim, tail, coordinate) :]
    weights = (lead_side[leads, 0] / trailing)[:, None] * tails[:, 0]
    same = starting_with(head_dim, tail, coordinate)
    weights[:, :same] *= merged[trailing.long()][:, tails[:same, 1].long()]
    return weights
