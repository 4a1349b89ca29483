"""The mean query and key, about which the global part expands."""

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
