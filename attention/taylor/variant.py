"""Taylor attention as a variant: gates, the kernel, its denominators, its fallbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch

from .. import gates, masks
from ..reasons import Fallback, Gate
from ..settings import TaylorSettings, VariantSettings
from ..variant import Call, Result, Variant
from .attend import Options, taylor_attention
from .features import feature_dim
from .mass import log_mass


def _options(settings: TaylorSettings) -> Options:
    return Options(
        sub_head_blocks=settings.sub_head_blocks,
        sub_head_mode=settings.sub_head_mode,
        centre_keys=settings.centre_keys,
        centre_queries=settings.centre_queries,
        centre_values=settings.centre_values,
        feature_projection=settings.feature_projection,
        block_q=settings.block_size_q,
        block_k=settings.block_size_k,
    )


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
        head_dim = query.shape[3]
        if head_dim > settings.max_head_dim:
            return Result(
                None,
                Fallback.HEAD_DIM,
                f"head_dim {head_dim} > max_head_dim {settings.max_head_dim}",
            )
        options = _options(settings)
        try:
            features = feature_dim(options.feature_width(head_dim), settings.P)
        except ValueError as error:
            return Result(None, Fallback.HEAD_DIM, str(error))
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

        attended = taylor_attention(
            query,
            key,
            value,
            call.scale * settings.scale_mul,
            settings.P,
            weights=weights,
            options=options,
            eps=settings.eps,
        )
        # "Not above" counts a NaN as bad, "at or below" would not.
        bad = (~(attended.denominator > settings.eps)).float().mean()
        stats: dict[str, torch.Tensor | float] = {
            "denom_min": attended.denominator.min(),
            "denom_bad_frac": bad,
        }
        if settings.fallback_on_negative and bool(bad > settings.denom_fallback_frac_limit):
            return Result(None, Fallback.DENOMINATOR, "", stats)
        mass = None
        # Independent slices have a denominator each, and none that stands for the whole head.
        if call.wants_log_mass and options.heads_per_head == 1:
            mass = log_mass(
                attended.denominator,
                query,
                key,
                call.scale * settings.scale_mul,
                call.mask,
                weights,
                centre_queries=settings.centre_queries,
                centre_keys=settings.centre_keys,
                eps=settings.eps,
            )
        return Result(attended.out, stats=stats, log_mass=mass)

    @classmethod
    def flops(
        cls, query_shape: Sequence[int], key_shape: Sequence[int], settings: VariantSettings
    ) -> float:
        """R features a token, each made by a product and met by Dv values and a denominator."""
        settings = cast(TaylorSettings, settings)
        batch, heads, queries, head_dim = query_shape
        options = _options(settings)
        features = feature_dim(options.feature_width(head_dim), settings.P)
        # Both modes hold B sets of features; independent ones meet a slice of the value each.
        columns = head_dim // options.heads_per_head + 1
        per_token = settings.sub_head_blocks * features * (1.0 + 2.0 * columns)
        width = head_dim // options.heads_per_head
        if 0 < settings.feature_projection < width:
            per_token += 2.0 * head_dim * settings.feature_projection
        return batch * heads * (queries + key_shape[2]) * per_token
