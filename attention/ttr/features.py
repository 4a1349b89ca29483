"""Learnt positive features of queries and keys, of a few heads at a time.

The far part of a query q stands for ``Σⱼ e^{q·kⱼ}`` over the keys out of its window, the scale's
root in both. With k̄ the mean of the image keys and q₀ a learnt point among the queries

``q·k = q·k̄ + q₀·(k - k̄) + (q - q₀)·(k - k̄)``.

The first two terms are kept as they are. The exponential of the third is a sum over features, each
of a factor of the query and one of the key: with ``x = W_q(q - q₀)`` and ``y = W_k(k - k̄)``

``c·Σ_f e^{±(x_f + b_f) - γ_q·mean(x²)/2}·e^{±y_f - γ_k·mean(y²)/2}``, over both signs.

That is the hedgehog map [e^{Wx}, e^{-Wx}]. With the rows of W drawn from a normal distribution,
c = 1 / F, b = 0 and γ = 1 its expectation is e^{x·y} (positive random features, symmetrised), from
which training starts. The mean of the keys makes the result independent of a shift of all keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOOR = 1e-30
"""Least mass in units of the largest feature: what lies below is nothing in float32."""


@dataclass(frozen=True, slots=True)
class Features:
    """The weights of G heads.

    Attributes:
        query_map: W_q, ``[G, F / 2, D]``.
        key_map: W_k, ``[G, F / 2, D]``.
        bias: b, ``[G, F / 2]``.
        centre: q₀, ``[G, D]``.
        damping: γ_q and γ_k, ``[G, 2]``.
        log_share: log c, ``[G]``.
    """

    query_map: torch.Tensor
    key_map: torch.Tensor
    bias: torch.Tensor
    centre: torch.Tensor
    damping: torch.Tensor
    log_share: torch.Tensor

    def of(self, heads: slice) -> Features:
        """Those of some heads."""
        return Features(
            self.query_map[heads],
            self.key_map[heads],
            self.bias[heads],
            self.centre[heads],
            self.damping[heads],
            self.log_share[heads],
        )

    def to(self, dtype: torch.dtype) -> Features:
        """The same in another dtype."""
        return Features(
            self.query_map.to(dtype),
            self.key_map.to(dtype),
            self.bias.to(dtype),
            self.centre.to(dtype),
            self.damping.to(dtype),
            self.log_share.to(dtype),
        )

    def of_queries(self, query: torch.Tensor, key_mean: torch.Tensor) -> torch.Tensor:
        """Logs of the queries' factors, c and e^{q·k̄} in them.

        Args:
            query: ``[G, S, D]``, times the scale's root.
            key_mean: k̄, ``[G, 1, D]``, times the scale's root.

        Returns:
            ``[G, S, F]``.
        """
        x = torch.matmul(query - self.centre.unsqueeze(1), self.query_map.transpose(-2, -1))
        own = (query * key_mean).sum(dim=-1, keepdim=True) - self.damped(x, 0)
        signed = x + self.bias.unsqueeze(1)
        return torch.cat([signed, -signed], dim=-1) + own + self.log_share.view(-1, 1, 1)

    def damped(self, projected: torch.Tensor, side: int) -> torch.Tensor:
        """``γ·mean(x²)/2`` of projected queries (side 0) or keys (1).

        Args:
            projected: ``[G, S, F / 2]``.
            side: which.

        Returns:
            ``[G, S, 1]``.
        """
        # A norm, unlike a mean of squares, takes no memory of the projections' size.
        norm: torch.Tensor = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
        squared = norm.square()
        return squared * (self.damping[:, side] * (0.5 / projected.shape[-1])).view(-1, 1, 1)

    def of_keys(self, centred: torch.Tensor) -> torch.Tensor:
        """Logs of the keys' factors.

        Args:
            centred: k - k̄, ``[G, N, D]``, times the scale's root.

        Returns:
            ``[G, N, F]``.
        """
        y = torch.matmul(centred, self.key_map.transpose(-2, -1))
        own = torch.matmul(centred, self.centre.unsqueeze(-1)) - self.damped(y, 1)
        return torch.cat([y, -y], dim=-1) + own


def first_maps(
    query: torch.Tensor, key: torch.Tensor, features: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_q and W_k of random features in the directions in which queries and keys meet.

    With C_q and C_k the covariances, the eigenvectors of C_q^½·C_k·C_q^½ are the directions that
    matter most for the logits' spread (bilinear PCA). In them query and key are stretched to equal
    spread, and the features' rows are random orthogonal ones of normal length.

    Args:
        query: ``[H, S, D]``, centred.
        key: ``[H, N, D]``, centred.
        features: F.
        generator: of the random directions, on the CPU.

    Returns:
        ``[H, F / 2, D]`` each.
    """
    heads, _, width = query.shape
    rank = min(_RANK, width)
    query_spread = query.transpose(-2, -1) @ query / query.shape[1]
    key_spread = key.transpose(-2, -1) @ key / key.shape[1]
    # Fewer queries than dimensions leave directions of which nothing is known.
    mean = query_spread.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(FLOOR)
    ridge = torch.eye(width, dtype=query.dtype, device=query.device) * _RIDGE
    values, vectors = torch.linalg.eigh(query_spread + ridge * mean.view(-1, 1, 1))
    values = values.clamp_min(FLOOR).unsqueeze(-2)
    root = (vectors * values.sqrt()) @ vectors.transpose(-2, -1)
    inverse = (vectors * values.rsqrt()) @ vectors.transpose(-2, -1)
    strengths, directions = torch.linalg.eigh(root @ key_spread @ root)
    strengths = strengths[:, -rank:].clamp_min(_LEAST_STRENGTH).unsqueeze(-1)
    leading = directions[:, :, -rank:].transpose(-2, -1)
    to_query = strengths.pow(0.25) * (leading @ inverse)
    to_key = strengths.pow(-0.25) * (leading @ root)
    rows = _normal_rows(heads, features // 2, rank, generator).to(query)
    return rows @ to_query, rows @ to_key


_RANK = 16
"""Directions that the first features see."""

_LENGTH = 0.5
"""Of the random rows, relative to those whose expectation is exact: shorter ones leave part of the
interaction out, and vary far less. Both chosen on the small Flux, before and after training."""

_RIDGE = 1e-4

_LEAST_STRENGTH = 1e-8


def _normal_rows(heads: int, count: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """``[heads, count, rank]``, rows of normal length, orthogonal within each ``rank`` of them."""
    blocks = []
    for _ in range(-(-count // rank)):
        own = torch.randn(heads, rank, rank, generator=generator)
        lengths = torch.randn(heads, rank, rank, generator=generator).norm(dim=-1, keepdim=True)
        blocks.append(torch.linalg.qr(own).Q * lengths)
    return torch.cat(blocks, dim=1)[:, :count] * _LENGTH
