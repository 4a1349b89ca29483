"""What the global part works on: query and key before and after rotation, and their means."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Means:
    """q̄ and k̄, ``[B, H, 1, D]`` each; zeros where nothing is centred."""

    query: torch.Tensor
    key: torch.Tensor

    def of(self, batch: slice, heads: slice) -> Means:
        """Those of some pictures and heads."""
        return Means(self.query[batch, heads], self.key[batch, heads])


def means(query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype, centre: bool) -> Means:
    """Over all tokens.

    Args:
        query: ``[B, H, N, D]``, any floating dtype.
        key: ``[B, H, N, D]``.
        dtype: of the answer.
        centre: False answers zeros.
    """
    if not centre:
        zero = query.new_zeros(*query.shape[:2], 1, query.shape[3], dtype=dtype)
        return Means(zero, zero)
    return Means(
        query.mean(dim=2, keepdim=True, dtype=dtype), key.mean(dim=2, keepdim=True, dtype=dtype)
    )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Query, key and value of some heads, ``[B, H, N, D or Dv]``, any floating dtype.

    Attributes:
        query: before rotary embedding.
        key: before rotary embedding.
        turned_query: after it.
        turned_key: after it.
        value: of the same tokens.
        mean: q̄ and k̄ before it.
        turned_mean: q̄ᴿ and k̄ᴿ after it.
    """

    query: torch.Tensor
    key: torch.Tensor
    turned_query: torch.Tensor
    turned_key: torch.Tensor
    value: torch.Tensor
    mean: Means
    turned_mean: Means

    def of(self, batch: slice, heads: slice) -> Tokens:
        """Some pictures and heads."""
        return Tokens(
            self.query[batch, heads],
            self.key[batch, heads],
            self.turned_query[batch, heads],
            self.turned_key[batch, heads],
            self.value[batch, heads],
            self.mean.of(batch, heads),
            self.turned_mean.of(batch, heads),
        )
