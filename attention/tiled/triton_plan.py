"""Sizes of the Triton path: what it takes, tile sizes, and memory, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .attend import Options
from .tiles import SLOTS
from .triton_tables import Tables

MAX_WIDTH = 128
"""Widest head that the kernels take: accumulators of more don't fit the registers."""

WORKING_BYTES = 1536 * 2**20
"""Copies, terms and weights of the heads that are computed at a time."""

_FP32 = 4


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes of the kernels.

    Attributes:
        together: query tiles of a program of the loop, 1 or 2. Two share the text, the
            pseudo-keys and most of their windows; picks are their own.
        far_block: pseudo-keys of one step.
        warps: of the loop.
        stages: of the loop's pipeline.
        pool_warps: of the pooling.
        pool_stages: likewise.
        text_in_kernel: whether text queries run in the loop too, not in torch's SDPA.
    """

    together: int = 2
    far_block: int = 64
    warps: int = 8
    stages: int = 2
    pool_warps: int = 8
    pool_stages: int = 1
    text_in_kernel: bool = False


def default_config(dtype: torch.dtype, head_dim: int, value_dim: int, picks: int) -> Config:
    """Tile sizes for a call, as measured on an H200."""
    if dtype == torch.float32:
        return Config(together=1, far_block=32, warps=8, stages=1)
    return Config(together=1 if picks else 2, warps=4 if picks else 8)


def padded(width: int) -> int:
    """The width that kernels compute with."""
    return max(16, 1 << (width - 1).bit_length())


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of Σ̄ and the first-order terms, whose products exceed fp16's range: fp32 for fp32, bf16."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def refusal(dtype: torch.dtype, head_dim: int, value_dim: int, scale: float) -> str:
    """Why the Triton path can't run a call; empty where it can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"Triton kernels take float32, float16 and bfloat16, not {dtype}"
    if max(head_dim, value_dim) > MAX_WIDTH:
        return f"head_dim {head_dim} or value width {value_dim} is above {MAX_WIDTH}"
    if not scale > 0:
        return f"scale {scale} is not above 0"
    return ""


def bytes_per_head(
    table_tiles: int,
    all_tiles: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    options: Options,
    picks: int,
) -> int:
    """Device memory of one head, without inputs and output.

    Args:
        table_tiles: T.
        all_tiles: T and the tiles of text.
        width: padded width of keys.
        value_width: padded width of values.
        dtype: of the input.
        options: of the approximation.
        picks: tiles that each query tile picks.
    """
    size, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    blocks = table_tiles * (SLOTS // options.block)
    total = all_tiles * SLOTS * (width + value_width) * size
    total += table_tiles * width * _FP32 + blocks * ((width + value_width) * size + _FP32)
    if options.first_order or picks:
        total += table_tiles * (width * value_width * wide + _FP32)
    if options.first_order:
        total += table_tiles * (width * value_width * wide + (table_tiles + 7) * wide)
    if picks:
        # Logits of tiles, their correction, its parts and scores; exact tiles as bytes.
        total += table_tiles * (blocks * 4 * _FP32 + table_tiles * (2 * _FP32 + 1))
    return total


def heads_together(
    table: Tables,
    heads: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    options: Options,
    picks: int,
) -> int:
    """How many heads are computed at a time, in runs as equal as can be."""
    each = bytes_per_head(
        table.tiles, table.all_tiles, width, value_width, dtype, options, picks
    )
    most = max(1, WORKING_BYTES // max(1, each))
    return math.ceil(heads / math.ceil(heads / most))
