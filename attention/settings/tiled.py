"""Settings of tiled attention."""

from __future__ import annotations

from typing import Literal

from .base import Group, Measured, reserve_factor_setting, reserve_setting, setting


class TiledSettings(Measured):
    """Tiled attention: exact near each query, one pseudo-key for every tile further away."""

    enabled: bool = setting(True, Group.GATE, "Off runs exact attention everywhere.")
    min_tokens: int = setting(
        -1,
        Group.GATE,
        "Calls with fewer tokens run exact attention. -1 goes by the device: 4,096 on a CPU, "
        "where 4,600 tokens are 1.4 to 1.8 times as fast as exact; 8,192 on others, where exact "
        "attention is so fast that fewer tokens lose time.",
        unit="tokens",
        ge=-1,
        le=1_000_000,
        step=1,
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
    tiled_sigma_max: float = setting(
        0.0,
        Group.GATE,
        "Run only at steps whose sigma is at most this. 0 sets no limit.",
        title="sigma max",
        unit="sigma",
        ge=0.0,
        le=1000.0,
        step=0.01,
    )
    tiled_layer_start: int = setting(
        -1,
        Group.GATE,
        "First block index at which to run, counted within its block type. -1 sets no limit.",
        title="layer start",
        unit="block",
        ge=-1,
        le=999,
    )
    tiled_layer_end: int = setting(
        -1,
        Group.GATE,
        "Last block index at which to run, inclusive. -1 sets no limit.",
        title="layer end",
        unit="block",
        ge=-1,
        le=999,
    )
    tiled_block_type: Literal["all", "double", "single"] = setting(
        "all", Group.GATE, "Kind of block in which to run.", title="block type"
    )

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
