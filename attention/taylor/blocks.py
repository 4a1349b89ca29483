"""Sub-head blocks: the coordinates of a head in slices, each with an expansion of its own.

R falls from C(D + P - 1, P - 1) to B times that of D/B. Two meanings:

- ``independent``: query, key *and value* are split, and each slice is an attention of its own with
  scale (D/B)^-½. Another operator than attention: its limit for many terms is B softmaxes.
- ``shared``: ``exp(Σ_b x_b) ≈ 1 + Σ_b Σ_{0 < p < P} x_b^p / p!`` with x_b the blocks' shares of
  q·k: one numerator over the whole value, one denominator, degree 0 once. It approximates
  attention and leaves out the terms that mix blocks.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

Mode = Literal["independent", "shared"]


class Sums(Protocol):
    """What `kernel.sums` does; a kernel for other devices has the same signature."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        terms: int,
        *,
        weights: torch.Tensor | None = None,
        constant: bool = True,
        block_q: int = 0,
        block_k: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def check(width: int, blocks: int, what: str) -> None:
    """Raise ValueError where ``blocks`` doesn't divide ``width``."""
    if width % blocks:
        raise ValueError(
            f"sub_head_blocks: {blocks} does not divide {what} {width}; allowed: its divisors"
        )


def split(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """``[B, H, N, D]`` as ``[B, H · blocks, N, D / blocks]``.

    A view where ``x`` lies feature-major in memory, else a copy.
    """
    check(x.shape[-1], blocks, "head_dim")
    batch, heads, tokens, width = x.shape
    parts = x.transpose(2, 3).reshape(batch, heads * blocks, width // blocks, tokens)
    return parts.transpose(2, 3)


def merge(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """The inverse of `split`."""
    batch, heads, tokens, width = x.shape
    whole = x.transpose(2, 3).reshape(batch, heads // blocks, width * blocks, tokens)
    return whole.transpose(2, 3)


def shared_sums(
    sums: Sums,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: int,
    blocks: int,
    *,
    weights: torch.Tensor | None,
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernel.sums` over the union of the blocks' terms. With one block, `kernel.sums` itself."""
    check(query.shape[-1], blocks, "feature dimension")
    width = query.shape[-1] // blocks
    numerator: torch.Tensor | None = None
    denominator: torch.Tensor | None = None
    for first in range(0, query.shape[-1], width):
        chosen = slice(first, first + width)
        num, den = sums(
            query[..., chosen],
            key[..., chosen],
            value,
            terms,
            weights=weights,
            constant=first == 0,
            block_q=block_q,
            block_k=block_k,
        )
        numerator = num if numerator is None else numerator.add_(num)
        denominator = den if denominator is None else denominator.add_(den)
        # The next block's sums come before these names are taken again.
        del num, den
    assert numerator is not None and denominator is not None
    return numerator, denominator
