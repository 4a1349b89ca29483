"""Taylor attention in plain torch, blocked over keys and queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .features import degree_dim, multiplicity_weights, next_degree


@dataclass(frozen=True, slots=True)
class KeyStatistics:
    """Sufficient statistics of keys and values, one item per degree.

    Attributes:
        s: ``[B, H, R_p, Dv]``: Σⱼ wⱼ ψ(kⱼ) vⱼᵀ, multiplicities included.
        z: ``[B, H, R_p, 1]``: Σⱼ wⱼ ψ(kⱼ), multiplicities included.
    """

    s: list[torch.Tensor]
    z: list[torch.Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the input is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _monomials(x: torch.Tensor, terms: int) -> Iterator[tuple[int, torch.Tensor]]:
    features = x.new_ones(*x.shape[:-1], 1)
    for degree in range(terms):
        if degree:
            features = next_degree(x, features, degree)
        yield degree, features


def key_statistics(
    key: torch.Tensor,
    value: torch.Tensor,
    terms: int,
    *,
    weights: torch.Tensor | None = None,
    block: int = 256,
) -> KeyStatistics:
    """Sum features of all keys, block by block.

    Args:
        key: ``[B, H, Nk, D]``, the share of the scale included.
        value: ``[B, H, Nk, Dv]``.
        terms: P, degrees below which are summed.
        weights: ``[B or 1, H or 1, Nk]``, a factor on each key's term; None for 1.
        block: keys at a time.

    Returns:
        Sums in float32 (float64 for float64 input).
    """
    dtype = accumulation_dtype(key.dtype)
    batch, heads, tokens, head_dim = key.shape
    sizes = [degree_dim(head_dim, degree) for degree in range(terms)]
    s = [
        torch.zeros(batch, heads, size, value.shape[-1], dtype=dtype, device=key.device)
        for size in sizes
    ]
    z = [torch.zeros(batch, heads, size, 1, dtype=dtype, device=key.device) for size in sizes]
    for start in range(0, tokens, block):
        chosen = slice(start, start + block)
        k, v = key[:, :, chosen].to(dtype), value[:, :, chosen].to(dtype)
        w = v.new_ones(1, 1, k.shape[2], 1)
        if weights is not None:
            w = weights[:, :, chosen, None].to(dtype)
            # 0 · NaN is NaN: a masked key may hold anything and must not count.
            k, v = torch.where(w == 0, 0.0, k), torch.where(w == 0, 0.0, v)
        wv, w = v * w, w.expand(batch, heads, k.shape[2], 1)
        for degree, features in _monomials(k, terms):
            transposed = features.transpose(-2, -1)
            s[degree] += torch.matmul(transposed, wv)
            z[degree] += torch.matmul(transposed, w)
    for degree in range(terms):
        factor = multiplicity_weights(head_dim, degree).to(key.device, dtype)[:, None]
        s[degree] *= factor
        z[degree] *= factor
    return KeyStatistics(s, z)


def taylor_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    terms: int,
    *,
    weights: torch.Tensor | None = None,
    block_q: int = 256,
    block_k: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of attention with exp replaced by its first ``terms`` terms.

    Args:
        query: ``[B, H, Nq, D]``.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, Dv]``.
        scale: factor on q·k; may be negative.
        terms: P, from 1 to 8; the degree is P - 1.
        weights: see `key_statistics`.
        block_q: queries at a time.
        block_k: keys at a time.

    Returns:
        Numerator ``[B, H, Nq, Dv]`` and denominator ``[B, H, Nq, 1]``, in float32 (float64 for
        float64 input).
    """
    dtype = accumulation_dtype(query.dtype)
    # Half of the scale on either side keeps both sides' monomials near 1.
    root = abs(scale) ** 0.5
    sums = key_statistics(key.to(dtype) * root, value, terms, weights=weights, block=block_k)
    numerator = query.new_empty(*query.shape[:3], value.shape[-1], dtype=dtype)
    denominator = query.new_empty(*query.shape[:3], 1, dtype=dtype)
    for start in range(0, query.shape[2], block_q):
        chosen = slice(start, start + block_q)
        q = query[:, :, chosen].to(dtype) * (root if scale >= 0 else -root)
        num, den = (
            torch.zeros_like(numerator[:, :, chosen]),
            torch.zeros_like(denominator[:, :, chosen]),
        )
        for degree, features in _monomials(q, terms):
            num += torch.matmul(features, sums.s[degree])
            den += torch.matmul(features, sums.z[degree])
        numerator[:, :, chosen], denominator[:, :, chosen] = num, den
    return numerator, denominator
