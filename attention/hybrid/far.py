"""What is not attended to exactly: sums of a Taylor series over the keys outside the window.

Of q·k after rotary embedding R, the parts that belong to the mean query q̄ᴿ and the mean key k̄ᴿ
after it are kept exactly, in all coordinates, and only the rest is taken from before it:

``Rq·Rk ≈ (q - q̄)·(k - k̄) + q̄ᴿ·(Rk - k̄ᴿ) + Rq·k̄ᴿ``.

The second part is a weight of the key, the third a factor of the query. The first is projected to
r coordinates and expanded: ``Σⱼ wⱼ Σ_{p<P} (q̃·k̃ⱼ)^p / p! vⱼ = ψ(q̃)ᵀ Σⱼ wⱼ ψ(k̃ⱼ) vⱼᵀ`` with
unique monomials ψ. Without rotation this is an identity. With it, the means are what rotation
changes most: before it every pair of tokens shares q̄·k̄, however far apart they stand, and far
tokens then weigh many times too much.

Blocks of queries go through the sequence in order. What lies before their window only grows, what
lies behind it only shrinks, so two sums serve all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..taylor.features import base_weights
from ..taylor.shaping import NormRule
from .basis import Basis
from .means import Tokens
from .monomials import monomials


@dataclass(frozen=True, slots=True)
class Low:
    """Query and key of some heads in few coordinates.

    Attributes:
        query: q̃, ``[B, H, N, r]``.
        key: k̃, ``[B, H, N, r]``.
        values: ``[B, H, N, Dv + 1]``: weighted values, and the weights beside them.
        log_factor: ``[B, H, N]``, log of what a query's sums are to be multiplied by; float32
            (float64 for float64 input).
    """

    query: torch.Tensor
    key: torch.Tensor
    values: torch.Tensor
    log_factor: torch.Tensor


def lower(tokens: Tokens, scale: float, basis: Basis, norm: NormRule, dtype: torch.dtype) -> Low:
    """Centre and project some heads.

    Args:
        tokens: of these heads.
        scale: factor on q·k; may be negative.
        basis: of these heads, fitted to ``q - q̄`` and ``k - k̄``.
        norm: how norms change in the few coordinates, before the scale.
        dtype: of features and values.
    """
    mean, turned = tokens.mean, tokens.turned_mean
    wide = mean.query.dtype
    # Without centring both means are 0: then the weights are 1 and the factor is none.
    factor = scale * torch.matmul(
        tokens.turned_query.to(wide), turned.key.transpose(-2, -1)
    ).squeeze(-1)
    exponent = scale * torch.matmul(
        tokens.turned_key.to(wide) - turned.key, turned.query.transpose(-2, -1)
    ).squeeze(-1)
    top = exponent.amax(dim=-1, keepdim=True)
    weights = torch.exp(exponent - top)[..., None]
    values = torch.cat([tokens.value.to(wide) * weights, weights], dim=-1).to(dtype)
    root = abs(scale) ** 0.5
    sign = root if scale >= 0 else -root
    query = torch.matmul(tokens.query - mean.query, basis.of_query.to(wide))
    key = torch.matmul(tokens.key - mean.key, basis.of_key.to(wide))
    if norm.changes:
        query, key = norm.apply(query), norm.apply(key)
    return Low((query * sign).to(dtype), (key * root).to(dtype), values, factor + top)


@dataclass(frozen=True, slots=True)
class FarBlock:
    """What the far keys give a block of queries.

    Attributes:
        out: ``[B, H, C, Dv]``, divided; zeros where the denominator is bad.
        log_mass: ``[B, H, C]``, comparable to a logsumexp of logits; -inf where it is bad.
        relative: ``[B, H, C]``, denominators over the sum of the far keys' weights.
    """

    out: torch.Tensor
    log_mass: torch.Tensor
    relative: torch.Tensor


class FarSums:
    """Sums over the keys before and behind a window that moves forward."""

    def __init__(self, low: Low, terms: int, start: int, stop: int, chunk: int) -> None:
        """
        Args:
            low: of some heads.
            terms: P.
            start: first key of the first window.
            stop: the key after its last one.
            chunk: keys whose features are held at a time.
        """
        self._low, self._terms, self._chunk = low, terms, chunk
        self._tokens, rank = low.key.shape[2:]
        wide = low.log_factor.dtype
        self._weights = base_weights(rank, terms - 1, low.key.device, low.key.dtype)
        shape = (*low.key.shape[:2], len(self._weights), low.values.shape[3])
        self._before = low.key.new_zeros(shape, dtype=wide)
        self._behind: torch.Tensor | None = low.key.new_zeros(shape, dtype=wide)
        self._start, self._stop = 0, stop
        self._add(self._behind, stop, self._tokens, 1)
        self.move(start, stop)

    def move(self, start: int, stop: int) -> None:
        """The window's new ends, neither below the ones before."""
        self._add(self._before, self._start, start, 1)
        if stop == self._tokens:
            # What is left of the subtractions would be rounding.
            self._behind = None
        elif self._behind is not None:
            self._add(self._behind, self._stop, stop, -1)
        self._start, self._stop = start, stop

    @property
    def empty(self) -> bool:
        """Whether the window holds all keys."""
        return self._start == 0 and self._stop == self._tokens

    def block(self, rows: slice, eps: float) -> FarBlock:
        """What the keys outside the window give some queries.

        Args:
            rows: of the queries.
            eps: relative denominators at or below it are bad.
        """
        sums = self._before if self._behind is None else self._before + self._behind
        wide, narrow = sums.dtype, self._low.query.dtype
        features = monomials(self._low.query[:, :, rows], self._terms) * self._weights
        both = torch.matmul(features, sums.to(narrow)).to(wide)
        # The feature of degree 0 is 1, so its sum beside the values is that of the weights.
        denominator = both[..., -1]
        relative = denominator / sums[:, :, :1, -1]
        good = relative > eps
        divisor = torch.where(good, denominator, 1.0)
        out = torch.where(good[..., None], both[..., :-1] / divisor[..., None], 0.0)
        log_mass = torch.where(good, divisor.log(), float("-inf"))
        return FarBlock(out, log_mass + self._low.log_factor[:, :, rows], relative)

    def _add(self, sums: torch.Tensor, first: int, last: int, sign: int) -> None:
        for start in range(first, last, self._chunk):
            some = slice(start, min(start + self._chunk, last))
            features = monomials(self._low.key[:, :, some], self._terms)
            part = torch.matmul(features.transpose(-2, -1), self._low.values[:, :, some])
            sums.add_(part, alpha=sign)
            # Or they would be held while the next ones are made.
            del features, part
