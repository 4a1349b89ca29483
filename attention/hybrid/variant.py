"""The local/global hybrid as a variant: gates, schedules, its fits, its fallbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch

from .. import gates
from ..reasons import Fallback, Gate
from ..reservation import Reservation
from ..settings import HybridSettings, VariantSettings
from ..taylor.attend import Options
from ..taylor.features import feature_dim
from ..taylor.probe import least_denominator
from ..taylor.shaping import NormRule
from ..token_layout import TokenLayout
from ..variant import Call, Result, RunInfo, Variant
from . import schedules
from .attend import Form, hybrid_attention
from .basis import Bases, Basis, Key, identity
from .means import Means
from .memory import Shape, working_bytes


class HybridVariant(Variant):
    """Exact in a window and to the text; everything else by a low-dimensional Taylor series."""

    name: ClassVar[str] = "hybrid"
    title: ClassVar[str] = "Hybrid"
    settings_model: ClassVar[type[VariantSettings]] = HybridSettings
    tells_log_mass: ClassVar[bool] = True
    wants_pre_rope: bool = True

    def __init__(self) -> None:
        self.prepare(RunInfo(sigmas=()))

    def prepare(self, run: RunInfo) -> None:
        self._bases = Bases()
        self._reservation = Reservation(run.reserve)

    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        settings = cast(HybridSettings, call.settings)
        if not settings.enabled:
            return Gate.DISABLED
        queries, keys = query.shape[2], key.shape[2]
        return (
            # A window needs query and key to be of the same tokens.
            gates.cross_attention(queries, keys, False)
            or gates.tokens(queries, keys, settings.min_tokens)
            or gates.sigma(call.sigma, settings.sigma_max)
            or gates.block_type(call.layer, settings.block_type)
            or gates.layers(call.layer, settings.layer_start, settings.layer_end)
            or _full_window(settings, call, keys)
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        settings = cast(HybridSettings, call.settings)
        tokens, head_dim = query.shape[2:]
        rank = min(settings.global_dim, head_dim)
        features = feature_dim(rank, settings.global_P)
        stats: dict[str, torch.Tensor | float] = {
            "head_dim": float(head_dim),
            "feature_dim": float(features),
        }
        if call.mask is not None:
            return Result(None, Fallback.MASK, "masks run exact", stats)
        prefix = _prefix(settings, call)
        if prefix is None:
            return Result(None, Fallback.TEXT_UNKNOWN, "", stats)
        if prefix >= tokens:
            detail = f"prefix_tokens {prefix} leaves nothing of {tokens} tokens"
            return Result(None, Fallback.LAYOUT, detail, stats)
        weight = schedules.global_weight(settings, call.sigma)
        if weight > 0.0:
            if features > settings.max_feature_dim_R:
                detail = f"R {features} > max_feature_dim_R {settings.max_feature_dim_R}"
                return Result(None, Fallback.FEATURE_DIM, detail, stats)
            if call.pre_rope is None:
                return Result(None, Fallback.PRE_ROPE, "", stats)
        form = Form(
            prefix=prefix,
            window=schedules.local_window(settings, call.sigma, tokens),
            chunk=settings.local_chunk,
            weight=weight,
            terms=settings.global_P,
            rank=rank,
            scale=call.scale * settings.global_scale_mul,
            centre=settings.global_centre,
            norm=NormRule(settings.global_norm_power, settings.global_norm_clip),
            wide=settings.force_fp32,
            eps=settings.eps,
            combine=settings.combine,
        )

        fits = rank < head_dim and settings.use_pca
        if settings.memory_reserve:
            self._make_room(query, value, form, fits, settings.memory_reserve_factor)

        def find_basis(
            query: torch.Tensor, key: torch.Tensor, mean: Means, dtype: torch.dtype
        ) -> Basis:
            which = Key(str(call.layer), query.shape[1], head_dim, rank, dtype, query.device)
            if not fits:
                return identity(which)
            named = call.layer is not None
            return self._bases.find(which, query, key, mean, settings.pca_samples, named=named)

        attended = hybrid_attention(query, key, value, call.scale, call.pre_rope, form, find_basis)
        if attended.least is not None and attended.bad is not None:
            stats["denom_min"], stats["denom_bad_frac"] = attended.least, attended.bad
            asked = settings.fallback_on_negative and _can_fail(settings)
            # The one decision that has to wait for the device.
            if asked and bool(attended.bad > settings.denom_fallback_frac_limit):
                return Result(None, Fallback.DENOMINATOR, "", stats)
        log_mass = None
        if attended.log_mass is not None and call.log_mass_rows is not None:
            log_mass = attended.log_mass.index_select(2, call.log_mass_rows)
        return Result(attended.out, stats=stats, log_mass=log_mass)

    def _make_room(
        self, query: torch.Tensor, value: torch.Tensor, form: Form, fits: bool, factor: float
    ) -> None:
        batch, heads, tokens, head_dim = query.shape
        shape = Shape(batch, heads, tokens, head_dim, value.shape[3])
        # How much the global part weighs follows sigma, and costs nothing.
        form = replace(form, weight=float(form.weight > 0.0))
        self._reservation.ask(
            (shape, query.dtype, form, fits),
            lambda: factor * working_bytes(shape, query.dtype, form, query.device, fits=fits),
            query.device,
        )

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        settings: VariantSettings,
        layout: TokenLayout | None = None,
    ) -> float:
        """Text rows and windows as exact attention, features as the Taylor variant counts them.

        The window is that of no schedule; text is what ``prefix_tokens`` says, or the layout.
        """
        settings = cast(HybridSettings, settings)
        batch, heads, _, head_dim = query_shape
        tokens = key_shape[2]
        prefix = settings.prefix_tokens
        if prefix < 0:
            prefix = 0 if layout is None else layout.text_tokens
        prefix = min(prefix, tokens)
        image = tokens - prefix
        window = schedules.local_window(settings, None, tokens)
        near = prefix + min(image, 2 * window + min(settings.local_chunk, image))
        pairs = prefix * tokens + image * near
        total = 4.0 * pairs * head_dim
        if settings.global_weight > 0.0:
            rank = min(settings.global_dim, head_dim)
            features = feature_dim(rank, settings.global_P)
            # A key enters the sums behind the window, leaves them, and enters those before it.
            total += image * 4 * features * (1.0 + 2.0 * (head_dim + 1))
            total += image * 4.0 * head_dim * rank
        return batch * heads * total


def _prefix(settings: HybridSettings, call: Call) -> int | None:
    """Text tokens; None where nobody says."""
    if settings.prefix_tokens >= 0:
        return settings.prefix_tokens
    return None if call.layout is None else call.layout.text_tokens


def _full_window(settings: HybridSettings, call: Call, tokens: int) -> Gate | None:
    """The joint form with all tokens near is what the model does anyway, and faster."""
    if settings.combine != "joint":
        return None
    window = schedules.local_window(settings, call.sigma, tokens)
    image = tokens - (_prefix(settings, call) or 0)
    return Gate.WINDOW_FULL if window >= image else None


def _can_fail(settings: HybridSettings) -> bool:
    """Whether finite input can have a bad denominator; half of the bound leaves room for
    rounding."""
    return settings.eps >= least_denominator(settings.global_P, Options()) / 2
