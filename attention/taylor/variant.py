"""Taylor attention as a variant: gates, the kernel, its denominators, its fallbacks."""

from __future__ import annotations

from typing import ClassVar, cast

import torch

from .. import gates, masks
from ..reasons import Fallback, Gate
from ..settings import TaylorSettings, VariantSettings
from ..variant import Call, Result, Variant
from .features import feature_dim
from .kernel import taylor_attention


class TaylorVariant(Variant):
    """Attention with a truncated exponential, exact where that can't be trusted."""

    name: ClassVar[str] = "taylor"
    title: ClassVar[str] = "Taylor"
    settings_model: ClassVar[type[VariantSettings]] = TaylorSettings

    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        settings = cast(TaylorSettings, call.settings)
        if not settings.enabled:
            return Gate.DISABLED
        queries, keys = query.shape[2], key.shape[2]
        return (
            gates.tokens(queries, keys, settings.min_tokens)
            or gates.sigma(call.sigma, settings.taylor_sigma_max)
            or gates.block_type(call.layer, settings.taylor_block_type)
            or gates.layers(call.layer, settings.taylor_layer_start, settings.taylor_layer_end)
            or gates.cross_attention(queries, keys, settings.allow_cross_attention)
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        settings = cast(TaylorSettings, call.settings)
        head_dim, keys = query.shape[3], key.shape[2]
        if head_dim > settings.max_head_dim:
            return Result(
                None,
                Fallback.HEAD_DIM,
                f"head_dim {head_dim} > max_head_dim {settings.max_head_dim}",
            )
        features = feature_dim(head_dim, settings.P)
        if features > settings.max_feature_dim_R:
            return Result(
                None,
                Fallback.FEATURE_DIM,
                f"R {features} > max_feature_dim_R {settings.max_feature_dim_R}",
            )
        weights = None
        if call.mask is not None:
            weights = masks.key_weights(call.mask, torch.float32)
            if weights is None:
                return Result(None, Fallback.MASK, "the mask differs from query to query")

        numerator, denominator = taylor_attention(
            query,
            key,
            value,
            call.scale * settings.scale_mul,
            settings.P,
            weights=weights,
            block_q=settings.block_size_q,
            block_k=settings.block_size_k,
        )
        floor = settings.eps * keys
        # "Not above" counts a NaN as bad, "at or below" would not.
        bad = (~(denominator > floor)).float().mean()
        stats: dict[str, torch.Tensor | float] = {
            "denom_min": denominator.min() / keys,
            "denom_bad_frac": bad,
        }
        if settings.fallback_on_negative and bool(bad > settings.denom_fallback_frac_limit):
            return Result(None, Fallback.DENOMINATOR, "", stats)
        out = (numerator / denominator.clamp_min(floor)).to(query.dtype)
        return Result(out, stats=stats)
