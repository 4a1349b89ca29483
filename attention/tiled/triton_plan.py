"""Sizes of the Triton path: what it takes, tile sizes, and memory, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..sums_paths import TiledPath
from ..token_layout import TokenLayout
from .far import tiles_sharing
from .options import Options, picked_tiles
from .tiles import SLOTS, tile_count

MAX_WIDTH = 128
"""Widest head that the kernels take: accumulators of more don't fit the registers."""

WORKING_BYTES = 1536 * 2**20
"""Copies, terms and weights of the heads that are computed at a time."""

PROGRAMS = 4
"""Programs of the pooling for each multiprocessor; each has a partial sum of Σ̄."""

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
        registers: of a thread of the loop at most; 0 leaves it to the compiler.
        pool_warps: of the pooling.
        text_in_kernel: whether text queries run in the loop too, not in torch's SDPA.
    """

    together: int = 1
    far_block: int = 64
    warps: int = 4
    stages: int = 2
    registers: int = 0
    pool_warps: int = 8
    text_in_kernel: bool = False


def default_config(dtype: torch.dtype) -> Config:
    """Tile sizes for a call, as measured on an H200."""
    if dtype == torch.float32:
        return Config(far_block=32, warps=8, stages=1)
    return Config()


def padded(width: int) -> int:
    """The width that kernels compute with."""
    return max(16, 1 << (width - 1).bit_length())


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of Σ̄ and the first-order terms, whose products exceed fp16's range: fp32 for fp32, bf16."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def refusal(
    dtype: torch.dtype, head_dim: int, value_dim: int, scale: float
) -> tuple[TiledPath, str] | None:
    """Why the Triton path can't run a call, as a code and in words; None where it can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        words = f"Triton kernels take float32, float16 and bfloat16, not {dtype}"
        return TiledPath.TORCH_DTYPE, words
    if max(head_dim, value_dim) > MAX_WIDTH:
        words = f"head_dim {head_dim} or value width {value_dim} is above {MAX_WIDTH}"
        return TiledPath.TORCH_WIDTH, words
    if not scale > 0:
        return TiledPath.TORCH_SCALE, f"scale {scale} is not above 0"
    return None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What memory depends on.

    Attributes:
        tiles: T.
        all_tiles: T and the tiles of text.
        shared: query tiles that share first-order terms.
        width: padded width of keys.
        value_width: padded width of values.
    """

    tiles: int
    all_tiles: int
    shared: int
    width: int
    value_width: int

    @classmethod
    def of(cls, layout: TokenLayout, head_dim: int, value_dim: int) -> Sizes:
        """The sizes of a layout's calls."""
        tiles = tile_count(layout)
        text = -(-layout.text_tokens // SLOTS)
        shared = tiles_sharing(layout)
        return cls(tiles, tiles + text, shared, padded(head_dim), padded(value_dim))


def bytes_per_head(sizes: Sizes, dtype: torch.dtype, options: Options, picks: int) -> int:
    """Device memory of one head beside input and output, in bytes.

    Args:
        sizes: of the call.
        dtype: of the input.
        options: of the approximation.
        picks: tiles that each query tile picks.
    """
    size, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    tiles, width, value_width = sizes.tiles, sizes.width, sizes.value_width
    blocks = tiles * (SLOTS // options.block)
    total = sizes.all_tiles * SLOTS * (width + value_width) * size
    total += tiles * width * _FP32 + blocks * ((width + value_width) * size + _FP32)
    total += tiles * _FP32
    if options.first_order or picks:
        total += tiles * (width * value_width * wide + _FP32)
    if options.first_order:
        total += tiles // sizes.shared * (width * value_width + tiles + 7) * wide
    if picks:
        # Logits of tiles, their correction and its parts, scores; exact tiles as bytes.
        total += tiles * (blocks * 4 * _FP32 + tiles * (2 * _FP32 + 1))
    return total


def heads_together(
    sizes: Sizes, heads: int, dtype: torch.dtype, options: Options, picks: int
) -> int:
    """How many of B·H heads are computed at a time, in runs as equal as can be."""
    most = max(1, WORKING_BYTES // bytes_per_head(sizes, dtype, options, picks))
    return math.ceil(heads / math.ceil(heads / most))


def memory_bytes(
    layout: TokenLayout,
    batch_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    options: Options,
    *,
    processors: int = 132,
) -> int:
    """Bytes that a call of the Triton path takes, with the output and without the inputs.

    Args:
        layout: of the tokens.
        batch_heads: B·H.
        head_dim: D.
        value_dim: Dv.
        dtype: of the input.
        options: of the approximation.
        processors: the GPU's multiprocessors, on which the partial sums of Σ̄ depend.
    """
    sizes = Sizes.of(layout, head_dim, value_dim)
    picks = picked_tiles(sizes.tiles, layout, options)
    heads = heads_together(sizes, batch_heads, dtype, options, picks)
    total = heads * bytes_per_head(sizes, dtype, options, picks)
    if options.correction:
        parts = math.ceil(PROGRAMS * processors / heads) * heads
        total += (parts + heads) * sizes.width**2 * _FP32
    # Text's rows exist once more until they are copied to their place.
    rows = layout.tokens + layout.text_tokens
    return total + batch_heads * rows * value_dim * dtype.itemsize
