"""Tiled attention as a variant: gates, what it needs of a call, its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch

from .. import gates
from ..reasons import Fallback, Gate
from ..reservation import Reservation
from ..settings import TiledSettings, VariantSettings
from ..token_layout import TokenLayout
from ..variant import Call, Result, RunInfo, Variant
from . import dispatch
from .far import tiles_sharing
from .options import Options, picked_tiles, window_tiles
from .tiles import SLOTS, tile_count

CPU_LEAST_TOKENS = 4096
DEVICE_LEAST_TOKENS = 8192
"""Where a call begins to be faster than exact, with room to spare: see ``docs/benchmarks.md``."""


def options_of(settings: TiledSettings) -> Options:
    """The approximation that settings ask for."""
    return Options(
        radius=settings.window_radius,
        top_k=settings.top_k,
        first_order=settings.far_order == 1,
        block=int(settings.centroid_size),
        correction=settings.variance_correction,
    )


def least_tokens(settings: TiledSettings, device: torch.device) -> int:
    """The least tokens of a call that is tiled."""
    if settings.min_tokens >= 0:
        return settings.min_tokens
    return CPU_LEAST_TOKENS if device.type == "cpu" else DEVICE_LEAST_TOKENS


class TiledVariant(Variant):
    """Attention that is exact near a query and pools what lies further away."""

    name: ClassVar[str] = "tiled"
    title: ClassVar[str] = "Tiled"
    settings_model: ClassVar[type[VariantSettings]] = TiledSettings
    tells_log_mass: ClassVar[bool] = True

    def __init__(self) -> None:
        self.prepare(RunInfo(sigmas=()))

    def prepare(self, run: RunInfo) -> None:
        self._reservation = Reservation(run.reserve)

    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        settings = cast(TiledSettings, call.settings)
        if not settings.enabled:
            return Gate.DISABLED
        queries, keys = query.shape[2], key.shape[2]
        return (
            gates.tokens(queries, keys, least_tokens(settings, query.device))
            or gates.cross_attention(queries, keys, allowed=False)
            or gates.dense_steps(call.step, settings.dense_first_steps)
            or gates.sigma(call.sigma, settings.tiled_sigma_max)
            or gates.block_type(call.layer, settings.tiled_block_type)
            or gates.layers(call.layer, settings.tiled_layer_start, settings.tiled_layer_end)
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        settings, layout = cast(TiledSettings, call.settings), call.layout
        stats: dict[str, torch.Tensor | float] = {"head_dim": float(query.shape[3])}
        if call.mask is not None:
            return Result(None, Fallback.MASK, "tiles are attended to without a mask", stats)
        if layout is None:
            detail = "the model does not say where its tokens stand in the picture"
            return Result(None, Fallback.LAYOUT, detail, stats)
        if layout.tokens != query.shape[2] or layout.tokens != key.shape[2]:
            detail = (
                f"the layout has {layout.tokens} tokens, the query {query.shape[2]}, "
                f"the key {key.shape[2]}"
            )
            return Result(None, Fallback.LAYOUT, detail, stats)
        if not layout.grids:
            return Result(None, Fallback.LAYOUT, "there are no image tokens", stats)
        options = options_of(settings)
        choice = dispatch.choose_for(settings.tiled_path, query, value, call.scale)
        stats["sums_path"] = float(choice.code)
        self._make_room(choice, query, value, layout, options, settings)
        attended = dispatch.attend(
            choice, query, key, value, call.scale, layout, options,
            log_mass_rows=call.log_mass_rows, dense=call.dense,
        )  # fmt: skip
        return Result(attended.out, stats=stats, log_mass=attended.log_mass)

    def _make_room(
        self,
        choice: dispatch.Choice,
        query: torch.Tensor,
        value: torch.Tensor,
        layout: TokenLayout,
        options: Options,
        settings: TiledSettings,
    ) -> None:
        if not settings.memory_reserve:
            return
        self._reservation.ask(
            (tuple(query.shape), value.shape[3], query.dtype, layout, options, choice.path),
            lambda: (
                settings.memory_reserve_factor
                * dispatch.working_bytes(choice, query, value, layout, options)
            ),
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
        """Products with exact keys and pseudo-keys, and the far field's own, per head.

        Raises:
            ValueError: there is no layout.
        """
        if layout is None:
            raise ValueError("layout: is None; allowed: a layout, which the cost depends on")
        options = options_of(cast(TiledSettings, settings))
        batch, heads, tokens, width = query_shape
        tiles, text = tile_count(layout), layout.text_tokens
        picked = picked_tiles(tiles, layout, options)
        pseudo = tiles * SLOTS // options.block
        pairs = float(text * tokens)
        for grid in layout.grids:
            exact = text + (window_tiles(grid, options.radius) + picked) * SLOTS
            pairs += grid[0] * grid[1] * (exact + pseudo)
        image = layout.image_tokens
        products = 4.0 * pairs * width
        if options.first_order:
            # H of each tile, their sums for tiles that share them, and each query with its sum.
            shared = tiles_sharing(layout)
            products += (4.0 * image + 2.0 * tiles**2 / shared) * width**2
        return batch * heads * products
