"""Exact attention: the reference that everything is measured against, and its variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from . import masks
from .reasons import Gate
from .settings import MonitorSettings, VariantSettings
from .token_layout import TokenLayout
from .variant import Call, Result, Variant, exact_flops


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    query_block: int = 512,
) -> torch.Tensor:
    """softmax(scale · q·kᵀ + mask) · v, in blocks of queries.

    Args:
        query: ``[B, H, Nq, D]``.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, Dv]``.
        scale: factor on q·k.
        mask: four-dimensional, see ``masks``. A query that may attend to nothing gets zeros.
        dtype: in which to compute.
        query_block: queries at a time; bounds the memory to ``B·H·query_block·Nk`` values.

    Returns:
        ``[B, H, Nq, Dv]`` in ``dtype``.
    """
    key, value = key.to(dtype), value.to(dtype)
    blocks = []
    for start in range(0, query.shape[2], query_block):
        rows = query[:, :, start : start + query_block].to(dtype)
        logits = torch.matmul(rows, key.transpose(-2, -1)) * scale
        block_mask = mask
        if mask is not None and mask.shape[2] != 1:
            block_mask = mask[:, :, start : start + query_block]
        weights = torch.softmax(masks.apply(logits, block_mask), dim=-1)
        blocks.append(torch.matmul(torch.nan_to_num(weights, nan=0.0), value))
    return torch.cat(blocks, dim=2)


class ExactVariant(Variant):
    """Attention left as it is. Only the measurements are ours."""

    name: ClassVar[str] = "exact"
    title: ClassVar[str] = "Exact (monitor only)"
    settings_model: ClassVar[type[VariantSettings]] = MonitorSettings
    attends: ClassVar[bool] = False

    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        return None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        """Leave the call to the model's own attention, which alone is bit-identical."""
        return Result(out=None)

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        settings: VariantSettings,
        layout: TokenLayout | None = None,
    ) -> float:
        return exact_flops(query_shape, key_shape)
