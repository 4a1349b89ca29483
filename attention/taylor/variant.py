"""Taylor attention as a variant: gates, the kernel, its denominators, its fallbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from .. import gates, masks
from ..reasons import Fallback, Gate
from ..reservation import Reservation
from ..settings import TaylorSettings, VariantSettings
from ..token_layout import TokenLayout
from ..variant import Call, Effective, Result, RunInfo, Tuning, Variant
from .attend import Options, taylor_attention
from .autotune import Tuner
from .blocks import Sums
from .deferred import WorstByLayer
from .dispatch import Choice
from .features import feature_dim
from .mass import mask_offset
from .memory import Shape, working_bytes
from .paths import pick
from .probe import least_denominator, probe_denominators
from .shaping import shape
from .triton_stream import StreamConfig


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
        round_denominators=not settings.denom_fp32,
    )


def _stream(settings: TaylorSettings) -> StreamConfig:
    return StreamConfig(
        feature_chunk=settings.fused_feature_chunk_size,
        value_chunk=settings.fused_value_chunk_size,
        store_bf16=settings.s_store_bf16,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """A call that nothing has refused yet.

    Attributes:
        shaped: what is expanded.
        is_shaped: whether that is another attention than the call's own.
        value: ``[B, H, Nk, Dv]``.
        weights: of the keys, ``[B or 1, H or 1, Nk]``; None for 1.
        options: of the expansion.
        settings: of the call.
        call: itself.
        choice: the path that computes the sums.
        sums: its implementation.
        stream: chunks of the streaming path.
        stats: what was measured so far; filled on the way.
    """

    shaped: Effective
    is_shaped: bool
    value: torch.Tensor
    weights: torch.Tensor | None
    options: Options
    settings: TaylorSettings
    call: Call
    choice: Choice
    sums: Sums
    stream: StreamConfig
    stats: dict[str, torch.Tensor | float]

    @property
    def layer(self) -> str:
        return str(self.call.layer)

    @property
    def can_fail(self) -> bool:
        """Whether finite input can have a bad denominator. A mask can leave nothing to divide."""
        least = least_denominator(self.settings.P, self.options)
        # Half of it leaves room for rounding.
        return self.weights is not None or self.settings.eps >= least / 2

    def bad_share(self, denominator: torch.Tensor) -> torch.Tensor:
        """0-dimensional. "Not above" counts a NaN as bad, "at or below" would not."""
        return (~(denominator > self.settings.eps)).float().mean()


class TaylorVariant(Variant):
    """Attention with a truncated exponential, exact where that can't be trusted."""

    name: ClassVar[str] = "taylor"
    title: ClassVar[str] = "Taylor"
    settings_model: ClassVar[type[VariantSettings]] = TaylorSettings
    tells_log_mass: ClassVar[bool] = True

    def __init__(self) -> None:
        self.prepare(RunInfo(sigmas=()))

    def prepare(self, run: RunInfo) -> None:
        self._tuner = Tuner(run.layers)
        self._reservation = Reservation(run.reserve)
        self._earlier = WorstByLayer()
        self._settings: TaylorSettings | None = None

    def retune(self, settings: VariantSettings) -> Tuning | None:
        return self._tuner.settle(cast(TaylorSettings, settings))

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
        if settings is not self._settings:
            # What other settings have brought about says nothing about these.
            self._earlier.clear()
            self._settings = settings
        head_dim = query.shape[3]
        stats: dict[str, torch.Tensor | float] = {"head_dim": float(head_dim)}
        if head_dim > settings.max_head_dim:
            detail = f"head_dim {head_dim} > max_head_dim {settings.max_head_dim}"
            return Result(None, Fallback.HEAD_DIM, detail, stats)
        options = _options(settings)
        try:
            features = feature_dim(options.feature_width(head_dim), settings.P)
        except ValueError as error:
            return Result(None, Fallback.HEAD_DIM, str(error), stats)
        stats["feature_dim"] = float(features)
        if features > settings.max_feature_dim_R:
            detail = f"R {features} > max_feature_dim_R {settings.max_feature_dim_R}"
            return Result(None, Fallback.FEATURE_DIM, detail, stats)
        weights = None
        if call.mask is not None:
            weights = masks.key_weights(call.mask, torch.float32)
            if weights is None:
                detail = "the mask differs from query to query"
                return Result(None, Fallback.MASK, detail, stats)
        stream = _stream(settings)
        choice, sums = pick(settings.taylor_path, stream, options, query, value, settings.P)
        self._tuner.watch(query, key, value, call, options, weights, sums)
        shaped = shape(query, key, call.scale, settings, call.sigma)
        is_shaped = shaped.query is not query or shaped.scale != call.scale
        job = _Job(
            shaped, is_shaped, value, weights, options, settings, call, choice, sums, stream, stats
        )
        self._make_room(job)
        refused = self._early(job)
        return refused if refused is not None else self._expand(job)

    def _make_room(self, job: _Job) -> None:
        settings, query = job.settings, job.shaped.query
        if not settings.memory_reserve:
            return
        batch, heads, queries, head_dim = query.shape
        keys, value_dim = job.value.shape[2:]
        sizes = Shape(batch, heads, queries, keys, head_dim, value_dim)
        path, stream = job.choice.path, job.stream
        kind = (path, sizes, query.dtype, settings.P, job.options, stream)
        self._reservation.ask(
            kind,
            lambda: (
                settings.memory_reserve_factor
                * working_bytes(
                    path,
                    sizes,
                    query.dtype,
                    settings.P,
                    job.options,
                    query.device,
                    stream=stream,
                )
            ),
            query.device,
        )

    def _early(self, job: _Job) -> Result | None:
        """What is known before the sums are made: the layer's earlier steps, or a probe."""
        settings = job.settings
        if not settings.fallback_on_negative:
            return None
        limit = settings.denom_fallback_frac_limit
        if settings.fallback_decision == "deferred":
            worst = self._earlier.worst(job.layer, job.call.step)
            if worst is None or worst <= limit:
                return None
            if settings.early_probe:
                # The only way in which a layer that runs exactly can be found well again.
                self._earlier.post(job.layer, job.call.step, self._probe(job))
            return Result(
                None, Fallback.DENOMINATOR_DEFERRED, f"share {worst:.3g} > {limit:g}", job.stats
            )
        if not settings.early_probe or not job.can_fail:
            return None
        if bool(self._probe(job) > limit):
            return Result(None, Fallback.DENOMINATOR_PROBE, "", job.stats)
        return None

    def _probe(self, job: _Job) -> torch.Tensor:
        """Share of bad denominators among a few queries."""
        denominator = probe_denominators(
            job.shaped.query,
            job.shaped.key,
            job.shaped.scale,
            job.settings.P,
            job.settings.probe_samples,
            weights=job.weights,
            options=job.options,
            seed=job.settings.quality_seed,
        )
        bad = job.bad_share(denominator)
        job.stats["probe_denom_min"] = denominator.min()
        job.stats["probe_bad_frac"] = bad
        return bad

    def _expand(self, job: _Job) -> Result:
        settings, shaped = job.settings, job.shaped
        job.stats["sums_path"] = float(job.choice.code)
        attended = taylor_attention(
            shaped.query,
            shaped.key,
            job.value,
            shaped.scale,
            settings.P,
            weights=job.weights,
            options=job.options,
            eps=settings.eps,
            sums=job.sums,
            log_mass_rows=job.call.log_mass_rows,
        )
        bad = job.bad_share(attended.denominator)
        job.stats["denom_min"] = attended.denominator.min()
        job.stats["denom_bad_frac"] = bad
        if settings.fallback_on_negative:
            if settings.fallback_decision == "deferred":
                self._earlier.post(job.layer, job.call.step, bad)
            elif bool(bad > settings.denom_fallback_frac_limit):
                return Result(None, Fallback.DENOMINATOR, "", job.stats)
        mass = attended.log_mass
        if mass is not None and job.call.mask is not None:
            mass = mass + mask_offset(job.call.mask)
        effective = shaped if job.is_shaped else None
        return Result(attended.out, stats=job.stats, log_mass=mass, effective=effective)

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        settings: VariantSettings,
        layout: TokenLayout | None = None,
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
