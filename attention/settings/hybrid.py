"""Settings of the local/global hybrid."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator

from .base import Group, Measured, setting
from .shared import (
    block_type_setting,
    enabled_setting,
    fallback_share_setting,
    layer_end_setting,
    layer_start_setting,
    min_tokens_setting,
    reserve_factor_setting,
    reserve_setting,
    sigma_max_setting,
)

_WINDOW = "0 means all tokens."


class HybridSettings(Measured):
    """Hybrid attention: exact in a window and to the text, a low-dimensional Taylor series for
    everything else."""

    enabled: bool = enabled_setting()
    min_tokens: int = min_tokens_setting(
        1024,
        "Calls with fewer tokens run exact attention.",
    )
    sigma_max: float = sigma_max_setting()
    layer_start: int = layer_start_setting()
    layer_end: int = layer_end_setting()
    block_type: Literal["all", "double", "single"] = block_type_setting()

    local_window: int = setting(
        512,
        Group.LOCAL,
        "Image tokens before and after a block of queries that are attended to exactly, in raster "
        "order. " + _WINDOW + " In force while the window has no schedule.",
        unit="tokens",
        ge=0,
        le=1_000_000,
        step=1,
    )
    local_window_min: int = setting(
        512,
        Group.LOCAL,
        "Window at and below the low sigma of its schedule. " + _WINDOW,
        unit="tokens",
        ge=0,
        le=1_000_000,
        step=1,
    )
    local_window_max: int = setting(
        0,
        Group.LOCAL,
        "Window at and above the high sigma of its schedule. " + _WINDOW,
        unit="tokens",
        ge=0,
        le=1_000_000,
        step=1,
    )
    local_window_sigma_low: float = setting(
        0.0,
        Group.LOCAL,
        "Sigma at and below which the window is at its least.",
        title="window sigma low",
        unit="sigma",
        ge=0.0,
        le=1000.0,
        step=0.01,
    )
    local_window_sigma_high: float = setting(
        0.0,
        Group.LOCAL,
        "Sigma at and above which the window is at its greatest; a smoothstep lies between. At or "
        "below the low sigma there is no schedule, and local window holds.",
        title="window sigma high",
        unit="sigma",
        ge=0.0,
        le=1000.0,
        step=0.01,
    )
    prefix_tokens: int = setting(
        -1,
        Group.LOCAL,
        "Tokens at the beginning that every query attends to exactly and that attend to "
        "everything exactly: the text. -1 takes what the model's inputs say; where they say "
        "nothing, the call runs exact.",
        unit="tokens",
        ge=-1,
        le=1_000_000,
        step=1,
    )
    local_chunk: int = setting(
        256,
        Group.MEMORY,
        "Queries of a block, which share one window. More run faster and see a little more.",
        unit="tokens",
        ge=1,
        le=65_536,
        advanced=True,
    )

    combine: Literal["joint", "additive"] = setting(
        "joint",
        Group.GLOBAL,
        "joint: one sum over what is exact and what is far, divided once, so that nothing counts "
        "twice. additive: two attentions, each divided by itself, local + weight · global over "
        "all tokens. The weights then sum to more than 1; it is there to compare with.",
    )
    global_weight: float = setting(
        1.0,
        Group.GLOBAL,
        "joint: factor on the mass of the far tokens, 1 for what the series says. additive: "
        "factor on the global output, where 0.1 was common. 0 leaves the global part out.",
        ge=0.0,
        le=4.0,
        step=0.01,
    )
    global_sigma_low: float = setting(
        0.0,
        Group.GLOBAL,
        "Sigma at and below which the global weight is full.",
        unit="sigma",
        ge=0.0,
        le=1000.0,
        step=0.01,
    )
    global_sigma_high: float = setting(
        0.0,
        Group.GLOBAL,
        "Sigma at and above which the global weight is 0, falling evenly from the low sigma on. "
        "At or below the low sigma the weight is full everywhere.",
        unit="sigma",
        ge=0.0,
        le=1000.0,
        step=0.01,
    )
    global_dim: int = setting(
        16,
        Group.GLOBAL,
        "Coordinates that query and key of each head keep for the series.",
        unit="coordinates",
        ge=1,
        le=128,
    )
    global_P: int = setting(
        3,
        Group.GLOBAL,
        "Number of Taylor terms; the degree is P - 1. Odd P (even degree) keeps every weight "
        "positive; even P can turn denominators negative.",
        title="global P (terms)",
        unit="terms",
        ge=1,
        le=7,
    )
    global_scale_mul: float = setting(
        1.0,
        Group.GLOBAL,
        "Factor on q·k of the global part.",
        ge=0.01,
        le=4.0,
        step=0.01,
    )
    global_norm_power: float = setting(
        0.0,
        Group.GLOBAL,
        "Divide every query and key of the series by this power of its norm n in the coordinates "
        "that are kept, which leaves n^(1 - power). 0 changes nothing, 1 normalizes. It keeps the "
        "series in its range and changes what it stands for.",
        ge=0.0,
        le=1.0,
        step=0.01,
    )
    global_norm_clip: float = setting(
        0.0,
        Group.GLOBAL,
        "Largest norm that a query or key of the series is left with, after the norm power. 0 "
        "sets no limit.",
        ge=0.0,
        le=1000.0,
        step=0.1,
    )
    global_centre: bool = setting(
        True,
        Group.GLOBAL,
        "Keep exactly, after rotary embedding and in all coordinates, what belongs to the mean "
        "query and the mean key. The series carries the rest. Off, far tokens weigh too much.",
        advanced=True,
    )
    use_pca: bool = setting(
        True,
        Group.GLOBAL,
        "Choose the coordinates for the least expected error of q·k, per layer and head, at the "
        "layer's first call of the run. Off keeps the head's first ones, which is what few tokens "
        "also get.",
        title="use PCA",
    )
    pca_samples: int = setting(
        2048,
        Group.GLOBAL,
        "Queries and keys of each picture that the coordinates are chosen by. 0 takes all; they "
        "are looked at a few at a time, so that more cost time, not memory.",
        title="PCA samples",
        unit="tokens",
        ge=0,
        le=65_536,
        advanced=True,
    )

    force_fp32: bool = setting(
        True,
        Group.STABILITY,
        "Compute the global part's features and products in float32. Off computes them in the "
        "dtype of the query. Sums over tokens are kept in float32 either way.",
        title="global part in float32",
        advanced=True,
    )
    eps: float = setting(
        1e-6,
        Group.STABILITY,
        "A global denominator at or below eps times the sum of its key weights counts as bad.",
        gt=0.0,
        le=1.0,
        step=1e-6,
        advanced=True,
    )
    fallback_on_negative: bool = setting(
        True,
        Group.STABILITY,
        "Run exact attention for a call whose share of bad denominators exceeds the limit. Only "
        "an even P can have any, and only there the call waits for the device. Off leaves the far "
        "tokens of such queries out.",
    )
    denom_fallback_frac_limit: float = fallback_share_setting()
    max_feature_dim_R: int = setting(
        50_000,
        Group.MEMORY,
        "Calls whose feature dimension R = C(r + P - 1, P - 1), r the global coordinates, is "
        "larger run exact.",
        title="max feature dim R",
        unit="features",
        ge=1,
        le=1_000_000_000,
        advanced=True,
    )

    memory_reserve: bool = reserve_setting()
    memory_reserve_factor: float = reserve_factor_setting()

    log_quality_stats: bool = setting(
        True,
        Group.QUALITY,
        "When a run ends, log its quality and append it, with the settings, to "
        "hybrid-attention-results.jsonl in ComfyUI's output folder.",
        live=False,
    )

    @field_validator("local_window_max")
    @classmethod
    def _not_below_least(cls, value: int, info: ValidationInfo) -> int:
        least = info.data.get("local_window_min", value)
        # 0 is all tokens, which is the most.
        if value != 0 and (least == 0 or value < least):
            words = "all tokens" if least == 0 else str(least)
            raise ValueError(
                f"local_window_max: is {value}; allowed: 0 for all tokens, or local_window_min "
                f"or more, which is {words}"
            )
        return value
