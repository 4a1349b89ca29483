"""Settings of tiled attention."""

from __future__ import annotations

from typing import Literal

from .base import Group, Measured, setting
from .shared import (
    block_type_setting,
    enabled_setting,
    layer_end_setting,
    layer_start_setting,
    min_tokens_setting,
    reserve_factor_setting,
    reserve_setting,
    sigma_max_setting,
)


class TiledSettings(Measured):
    """Tiled attention: exact near each query, one pseudo-key for every tile further away."""

    enabled: bool = enabled_setting()
    min_tokens: int = min_tokens_setting(
        -1,
        "Calls with fewer tokens run exact attention. -1 goes by the device: 4,096 on a CPU, "
        "where 4,600 tokens are 1.4 to 1.8 times as fast as exact; 8,192 on others, where exact "
        "attention is so fast that fewer tokens lose time.",
        least=-1,
    )
    dense_first_steps: int = setting(
        2,
        Group.GATE,
        "Steps at the beginning that run exact attention: they lay out the picture, and an error "
        "there grows in all that follows. 10 to 20 % of the steps is usual.",
        unit="steps",
        ge=0,
        le=1000,
    )
    tiled_sigma_max: float = sigma_max_setting()
    tiled_layer_start: int = layer_start_setting()
    tiled_layer_end: int = layer_end_setting()
    tiled_block_type: Literal["all", "double", "single"] = block_type_setting()

    window_radius: int = setting(
        1,
        Group.APPROXIMATION,
        "Tiles of 8×8 tokens around each query's own tile that are exact, in each direction: 1 is "
        "a window of 3×3 tiles, 2 of 5×5. Time grows with its square; the error falls. 0 keeps "
        "the own tile alone.",
        unit="tiles",
        ge=0,
        le=64,
    )
    top_k: int = setting(
        0,
        Group.APPROXIMATION,
        "Further tiles that are exact for each query tile: those whose approximation would err "
        "most, by mass and by how much values differ within the tile.",
        unit="tiles",
        ge=0,
        le=4096,
    )
    far_order: int = setting(
        1,
        Group.APPROXIMATION,
        "1 lets the value of a far tile follow the query to first order; 0 takes the tile's mean "
        "value. 1 costs little, and matters most where attention is spread widely.",
        ge=0,
        le=1,
    )
    centroid_size: Literal["64", "16"] = setting(
        "64",
        Group.APPROXIMATION,
        "Keys that one pseudo-key stands for: a tile, or a quarter of one. 16 makes the error "
        "smaller and, above about 16,000 tokens, attention noticeably slower.",
        unit="keys",
    )
    variance_correction: bool = setting(
        True,
        Group.APPROXIMATION,
        "Let a far tile's weight grow with the spread of its keys. Without it far tiles get too "
        "little weight, which shifts the whole picture.",
    )

    tiled_path: Literal["auto", "torch", "triton"] = setting(
        "auto",
        Group.MEMORY,
        "What computes it. auto takes the Triton kernels where CUDA and Triton are there and the "
        "call is of bf16 or fp16, else torch. Both compute the same approximation.",
        title="path",
        advanced=True,
    )
    memory_reserve: bool = reserve_setting()
    memory_reserve_factor: float = reserve_factor_setting()
