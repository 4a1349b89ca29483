"""Settings of Taylor attention."""

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


class TaylorSettings(Measured):
    """Taylor attention: the exponential as a truncated power series over unique monomials."""

    enabled: bool = enabled_setting()
    min_tokens: int = min_tokens_setting(
        100,
        "Calls with fewer query or key tokens run exact attention.",
    )
    taylor_sigma_max: float = sigma_max_setting(
        " Early steps (high sigma) lay out the picture, late ones add detail."
    )
    taylor_layer_start: int = layer_start_setting()
    taylor_layer_end: int = layer_end_setting()
    taylor_block_type: Literal["all", "double", "single"] = block_type_setting()
    allow_cross_attention: bool = setting(
        True, Group.GATE, "Run also where query and key lengths differ.", advanced=True
    )

    qk_normalize: bool = setting(
        False,
        Group.SCALE,
        "Give every query and key of each head the norm 1, which leaves logits of at most the "
        "scale: attention becomes nearly uniform. The same as a norm power of 1.",
        title="normalize q and k",
    )
    qk_norm_power: float = setting(
        0.0,
        Group.SCALE,
        "Divide every query and key by this power of its norm n, which leaves n^(1 - power). "
        "0 changes nothing, 1 normalizes. It changes the operator.",
        title="norm power",
        ge=0.0,
        le=1.0,
        step=0.01,
    )
    qk_norm_clip: float = setting(
        0.0,
        Group.SCALE,
        "Largest norm that a query or key is left with, after the norm power. 0 sets no limit.",
        title="norm clip",
        ge=0.0,
        le=1000.0,
        step=0.1,
    )
    qk_norm_sigma_max: float = setting(
        0.0,
        Group.SCALE,
        "Change norms only at steps whose sigma is at most this. 0 sets no limit. It does not "
        "hold for the scale factor.",
        title="norm sigma max",
        unit="sigma",
        ge=0.0,
        le=1000.0,
        step=0.01,
    )
    scale_mul: float = setting(
        1.0,
        Group.SCALE,
        "Factor on q·k before the expansion. Below 1 it keeps the series in its range and makes "
        "attention softer: it changes the operator.",
        ge=0.01,
        le=4.0,
        step=0.01,
    )

    P: int = setting(
        3,
        Group.APPROXIMATION,
        "Number of Taylor terms; the degree is P - 1. Odd P (even degree) keeps every weight "
        "positive; even P can turn denominators negative. Cost grows as head_dim^(P-1).",
        title="P (terms)",
        unit="terms",
        ge=1,
        le=8,
    )
    feature_projection: int = setting(
        32,
        Group.APPROXIMATION,
        "Coordinates that query and key of each head keep before the expansion, chosen for the "
        "least expected error of q·k. 0, or as many as the head has, keeps all. Fewer allow more "
        "terms: R = C(r + P - 1, P - 1). What is left out acts as if its logits were 0. At P 3 "
        "the series errs more than 32 coordinates do, and all 128 make it 15 times as dear.",
        title="feature projection r",
        unit="coordinates",
        ge=0,
        le=1024,
    )
    centre_queries: bool = setting(
        True,
        Group.APPROXIMATION,
        "Expand about the mean query: what the mean query gives each key is computed exactly, as "
        "a weight of the key, and the series carries the rest. Changes nothing in the limit of "
        "many terms.",
    )
    centre_keys: bool = setting(
        True,
        Group.APPROXIMATION,
        "Take the mean key from all keys, which attention does not see and the series has less "
        "to carry. Changes nothing in the limit of many terms.",
    )
    centre_values: bool = setting(
        True,
        Group.APPROXIMATION,
        "Take the mean value out and add it back after the division. Without rounding it changes "
        "nothing; with it, less is lost.",
    )
    sub_head_blocks: int = setting(
        1,
        Group.APPROXIMATION,
        "Slices into which each head's coordinates are split, each with a series of its own; must "
        "divide the head dimension. 1 expands the whole head, the only choice that tends to exact "
        "attention with more terms. More make R smaller: B · C(head_dim/B + P - 1, P - 1).",
        unit="blocks",
        ge=1,
        le=16,
    )
    sub_head_mode: Literal["independent", "shared"] = setting(
        "shared",
        Group.APPROXIMATION,
        "Independent: query, key and value are split, and every slice is an attention of its own "
        "with scale (head_dim/B)^-0.5. It is fast and another operator than attention. Shared: "
        "one numerator over the whole value and one denominator over all slices' terms. It "
        "approximates attention without the terms that mix slices, and with 3 slices or more "
        "(2 or more from P = 5) even an odd P can turn denominators negative.",
    )

    eps: float = setting(
        1e-6,
        Group.STABILITY,
        "A denominator at or below eps times the sum of the key weights (the number of keys, "
        "without mask and centring) counts as bad.",
        gt=0.0,
        le=1.0,
        step=1e-6,
        advanced=True,
    )
    fallback_on_negative: bool = setting(
        True,
        Group.STABILITY,
        "Run exact attention for a call whose share of bad denominators exceeds the limit. Off "
        "clamps them to eps: the picture can break.",
    )
    denom_fallback_frac_limit: float = fallback_share_setting()
    fallback_decision: Literal["same_call", "deferred"] = setting(
        "same_call",
        Group.STABILITY,
        "same_call decides about a call by its own denominators: safe, and the host waits for "
        "the device once a call (twice with an early probe), which a GPU feels. deferred never "
        "waits: it decides by the layer's last step whose numbers have arrived. A layer with bad "
        "denominators turns exact one step later; until then they are clamped to eps, and that "
        "step's output can be wrong. It comes back when the early probe finds it well, or when "
        "settings change.",
        title="fallback decision",
    )
    early_probe: bool = setting(
        True,
        Group.STABILITY,
        "Look at the denominators of a few queries first, which takes a small part of the work, "
        "and run exact at once where too many of them are bad. Left out where the settings allow "
        "no bad denominator (an odd P over whole heads).",
    )
    probe_samples: int = setting(
        16,
        Group.STABILITY,
        "Queries that the early probe looks at.",
        unit="queries",
        ge=1,
        le=1024,
        advanced=True,
    )
    denom_fp32: bool = setting(
        True,
        Group.STABILITY,
        "Test and divide by denominators in float32, in which they are summed. Off rounds them "
        "to the dtype of the query first, as attention in half precision does. No effect on "
        "float32 input.",
        title="denominators in float32",
        advanced=True,
    )
    max_head_dim: int = setting(
        128,
        Group.STABILITY,
        "Calls with a larger head dimension run exact attention.",
        unit="channels",
        ge=1,
        le=1024,
        advanced=True,
    )

    max_feature_dim_R: int = setting(
        370_000,
        Group.MEMORY,
        "Calls whose feature dimension R = C(r + P - 1, P - 1), r the coordinates of one series, "
        "is larger run exact. Memory does not grow with it, time does.",
        title="max feature dim R",
        unit="features",
        ge=1,
        le=1_000_000_000,
    )
    memory_reserve: bool = reserve_setting()
    memory_reserve_factor: float = reserve_factor_setting()
    block_size_q: int = setting(
        0,
        Group.MEMORY,
        "Queries per block. 0 chooses by cache and memory, and is the fastest.",
        unit="tokens",
        ge=0,
        le=65_536,
        advanced=True,
    )
    block_size_k: int = setting(
        0,
        Group.MEMORY,
        "Keys per block. 0 chooses by cache and memory, and is the fastest.",
        unit="tokens",
        ge=0,
        le=65_536,
        advanced=True,
    )
    taylor_path: Literal["auto", "torch", "streaming", "full"] = setting(
        "auto",
        Group.MEMORY,
        "What computes the sums. auto takes the fastest that fits the call; streaming is the "
        "Triton path that works in chunks of features (elsewhere called fused_kernel), full the "
        "one that holds all of them (fused_full_kernel; P up to 4). "
        "Without Triton or CUDA, torch runs.",
        title="path",
        advanced=True,
    )
    fused_feature_chunk_size: int = setting(
        8192,
        Group.MEMORY,
        "Features per chunk of the streaming path. More run faster and take more memory.",
        unit="features",
        ge=64,
        le=1_048_576,
        advanced=True,
    )
    fused_value_chunk_size: int = setting(
        0,
        Group.MEMORY,
        "Value channels per chunk of the streaming path; 0 takes all of them, up to 128, at "
        "once. Fewer take less memory and more time.",
        unit="channels",
        ge=0,
        le=1024,
        advanced=True,
    )
    s_store_bf16: bool = setting(
        False,
        Group.MEMORY,
        "Keep the streaming path's sums in bf16: half the memory, faster, a little less exact. "
        "No effect on float32 input.",
        title="store sums in bf16",
        advanced=True,
    )

    auto_tune: bool = setting(
        False,
        Group.TUNING,
        "In the first steps try other values of norm power, norm clip and scale factor, and go "
        "on with those of the least error, for all layers alike. They become a revision of the "
        "run. Switch it off and on again to tune anew.",
    )
    auto_tune_steps: int = setting(
        1,
        Group.TUNING,
        "Steps that are tuned on; those at which no call is due don't count.",
        unit="steps",
        ge=1,
        le=100,
    )
    auto_tune_candidates: int = setting(
        8,
        Group.TUNING,
        "Settings that are tried, besides those in force.",
        ge=1,
        le=64,
    )
    auto_tune_samples: int = setting(
        8,
        Group.TUNING,
        "Calls per step on which they are tried, spread over the layers.",
        unit="calls",
        ge=1,
        le=1024,
    )
    auto_tune_max_tokens: int = setting(
        512,
        Group.TUNING,
        "Queries and keys of such a call that are looked at, spread over the whole sequence.",
        unit="tokens",
        ge=16,
        le=8192,
    )
    auto_tune_seed: int = setting(
        0, Group.TUNING, "Seed of what is tried.", ge=0, le=2**31 - 1, advanced=True
    )
    auto_tune_power_min: float = setting(
        0.2, Group.TUNING, "Least norm power that is tried.", ge=0.0, le=1.0, step=0.01,
        advanced=True,
    )  # fmt: skip
    auto_tune_power_max: float = setting(
        0.7, Group.TUNING, "Greatest norm power that is tried.", ge=0.0, le=1.0, step=0.01,
        advanced=True,
    )  # fmt: skip
    auto_tune_clip_min: float = setting(
        8.0, Group.TUNING, "Least norm clip that is tried.", ge=0.1, le=1000.0, step=0.1,
        advanced=True,
    )  # fmt: skip
    auto_tune_clip_max: float = setting(
        20.0, Group.TUNING, "Greatest norm clip that is tried.", ge=0.1, le=1000.0, step=0.1,
        advanced=True,
    )  # fmt: skip
    auto_tune_scale_min: float = setting(
        0.8, Group.TUNING, "Least scale factor that is tried.", ge=0.01, le=4.0, step=0.01,
        advanced=True,
    )  # fmt: skip
    auto_tune_scale_max: float = setting(
        1.0, Group.TUNING, "Greatest scale factor that is tried.", ge=0.01, le=4.0, step=0.01,
        advanced=True,
    )  # fmt: skip

    @field_validator("auto_tune_power_max", "auto_tune_clip_max", "auto_tune_scale_max")
    @classmethod
    def _not_below_least(cls, value: float, info: ValidationInfo) -> float:
        least = str(info.field_name).removesuffix("max") + "min"
        if value < info.data.get(least, value):
            raise ValueError(
                f"{info.field_name}: is {value:g}; allowed: {least} or more, which is "
                f"{info.data[least]:g}"
            )
        return value
