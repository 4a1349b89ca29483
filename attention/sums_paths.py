"""Which implementation computed a call's sums, and why no better one: codes that a metric carries.

Numbers are stable: stored runs refer to them. Tens tell the path, and of a variant's paths a
better one has a higher number, so that the least of several is the one to look at. Neither torch
nor ComfyUI is imported.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

Path = Literal["torch", "streaming", "full"]

_PATHS: tuple[Path, ...] = ("torch", "streaming", "full")


class SumsPath(IntEnum):
    """A path, and what kept the call from the next better one; a bare name is what was set."""

    TORCH = 0
    TORCH_NO_TRITON = 1
    TORCH_NO_CUDA = 2
    TORCH_DTYPE = 3
    TORCH_FEW_KEYS = 4
    TORCH_TERMS = 5
    STREAMING = 10
    STREAMING_TERMS = 11
    STREAMING_HEAD_DIM = 12
    STREAMING_VALUE_DIM = 13
    FULL = 20

    @property
    def path(self) -> Path:
        """What runs."""
        return _PATHS[self // 10]


class TiledPath(IntEnum):
    """The path of tiled attention, and what kept the call from Triton's kernels."""

    TORCH = 30
    TORCH_NO_TRITON = 31
    TORCH_NO_CUDA = 32
    TORCH_DTYPE = 33
    TORCH_FLOAT32 = 34
    TORCH_FEW_TOKENS = 35
    TORCH_WIDTH = 36
    TORCH_SCALE = 37
    TORCH_OLD_GPU = 38
    TRITON = 40


NAMES: dict[int, str] = {
    SumsPath.TORCH: "torch (as set)",
    SumsPath.TORCH_NO_TRITON: "torch (Triton is not installed)",
    SumsPath.TORCH_NO_CUDA: "torch (no CUDA device)",
    SumsPath.TORCH_DTYPE: "torch (Triton kernels take float32, float16 and bfloat16)",
    SumsPath.TORCH_FEW_KEYS: "torch (too few keys to be worth a Triton kernel)",
    SumsPath.TORCH_TERMS: "torch (P is too high for the Triton paths)",
    SumsPath.STREAMING: "streaming (as set)",
    SumsPath.STREAMING_TERMS: "streaming (P is too high for the full path)",
    SumsPath.STREAMING_HEAD_DIM: "streaming (head_dim is too large for the full path at this P)",
    SumsPath.STREAMING_VALUE_DIM: "streaming (value_dim is too large for the full path)",
    SumsPath.FULL: "full",
    TiledPath.TORCH: "torch (as set)",
    TiledPath.TORCH_NO_TRITON: "torch (Triton is not installed)",
    TiledPath.TORCH_NO_CUDA: "torch (no CUDA device)",
    TiledPath.TORCH_DTYPE: "torch (Triton kernels take float32, float16 and bfloat16)",
    TiledPath.TORCH_FLOAT32: "torch (Triton kernels are not faster at float32)",
    TiledPath.TORCH_FEW_TOKENS: "torch (too few tokens to be worth a Triton kernel)",
    TiledPath.TORCH_WIDTH: "torch (head_dim or value_dim is too large for the Triton kernels)",
    TiledPath.TORCH_SCALE: "torch (the scale is not above 0)",
    TiledPath.TORCH_OLD_GPU: "torch (the GPU is too old for the Triton kernels)",
    TiledPath.TRITON: "Triton kernels",
}
"""For people; the word before the bracket is the path."""
