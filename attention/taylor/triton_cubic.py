"""The cubic series (P = 4) of 16-bit heads in Triton: sums over keys, applied to queries.

A fully fused path of its own beside `triton_full`, for with three times as many products the
layout decides the time; `triton_cubic_plan` describes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from .triton_cubic_plan import BLOCK, MASS_COLUMNS, CubicConfig, check_cubic, cubic_layout
from .triton_plan import Division, padded, split_count
from .triton_support import kernels, multiprocessors

_REDUCED_ROWS = 16


@dataclass(frozen=True, slots=True)
class _Tables:
    """`CubicLayout` on the device, what is chosen in bf16."""

    chunks: int
    common: int
    lifts: int
    chosen: torch.Tensor
    ones: torch.Tensor
    weights: torch.Tensor


@lru_cache(maxsize=16)
def _tables(head_dim: int, value_dim: int, chunk: int, device: torch.device) -> _Tables:
    layout = cubic_layout(head_dim, value_dim, chunk)
    with torch.inference_mode(False):
        return _Tables(
            layout.chunks,
            layout.common,
            layout.lifts,
            layout.chosen.to(device, torch.bfloat16),
            layout.ones.to(device),
            layout.weights.to(device),
        )


@dataclass(frozen=True, slots=True)
class CubicStatistics:
    """Sums over keys that the read needs.

    Attributes:
        sums: ``[BH, tiles, chunk, lifts * DV]`` bf16.
        masses: ``[BH, tiles, chunk, MASS_COLUMNS]`` bf16, the same for the denominator.
        s_0: ``[BH, DV]`` fp32, Σ w v.
        z_0: ``[BH]`` fp32, Σ w.
    """

    sums: torch.Tensor
    masses: torch.Tensor
    s_0: torch.Tensor
    z_0: torch.Tensor


def build(
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    weights: torch.Tensor | None,
    config: CubicConfig,
    finite: bool = False,
) -> CubicStatistics:
    """Phase A: sums over keys; arguments as in `triton_full.build`."""
    batch, heads, tokens, head_dim = key.shape
    tables = _tables(head_dim, value.shape[3], config.chunk, key.device)
    tiles, chunk, lifts = tables.weights.shape
    width, bh = padded(value.shape[3]), batch * heads
    splits = split_count(tiles * bh, tokens, multiprocessors(value.device))
    # Rounded to whole steps of the kernel, so that only the last split is ragged.
    per_split = math.ceil(tokens / (splits * config.block_t)) * config.block_t
    splits = math.ceil(tokens / per_split)
    partial = key.new_empty(splits, bh, tiles, chunk, lifts * width, dtype=torch.float32)
    partial_mass = key.new_empty(splits, bh, tiles, chunk, MASS_COLUMNS, dtype=torch.float32)
    column = key.new_empty(splits, bh, width, dtype=torch.float32)
    module = kernels("triton_cubic_kernels")
    module.cubic_build_kernel[(tiles, bh, splits)](
        key,
        value,
        weights if weights is not None else key,
        tables.chosen,
        tables.ones,
        partial,
        partial_mass,
        column,
        heads,
        tokens,
        per_split,
        head_dim,
        value.shape[3],
        *key.stride()[:3],
        *value.stride()[:3],
        *(weights.stride() if weights is not None else (0, 0, 0)),
        CHUNKS=tables.chunks,
        BLOCK_LIFTS=BLOCK // lifts,
        D=padded(head_dim),
        DV=width,
        F=chunk,
        L=lifts,
        M=MASS_COLUMNS,
        BT=config.block_t,
        WEIGHTED=weights is not None,
        FINITE=finite,
        num_warps=config.build_warps,
        num_stages=config.build_stages,
    )
    sums = key.new_empty(bh, tiles, chunk, lifts * width, dtype=torch.bfloat16)
    masses = key.new_empty(bh, tiles, chunk, MASS_COLUMNS, dtype=torch.bfloat16)
    module.cubic_reduce_kernel[(tiles * chunk // _REDUCED_ROWS, bh)](
        partial,
        partial_mass,
        tables.weights,
        sums,
        masses,
        splits,
        DV=width,
        F=chunk,
        L=lifts,
        M=MASS_COLUMNS,
        BF=_REDUCED_ROWS,
        num_warps=4,
    )
    if weights is None:
        z_0 = key.new_full((bh,), float(tokens), dtype=torch.float32)
    else:
        z_0 = weights.sum(-1, dtype=torch.float32).reshape(bh)
    return CubicStatistics(sums, masses, column.sum(0), z_0)


def read(
    query: torch.Tensor,
    statistics: CubicStatistics,
    value_dim: int,
    *,
    config: CubicConfig,
    division: Division | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase B: the sums applied to queries; arguments and results as in `triton_full.read`."""
    check_cubic(config)
    batch, heads, tokens, head_dim = query.shape
    tables = _tables(head_dim, value_dim, config.chunk, query.device)
    tiles, chunk, lifts = tables.weights.shape
    width = padded(value_dim)
    if division is None:
        numerator = query.new_empty(batch, heads, tokens, value_dim, dtype=torch.float32)
    else:
        numerator = division.out
    denominator = query.new_empty(batch, heads, tokens, 1, dtype=torch.float32)
    kernels("triton_cubic_kernels").cubic_read_kernel[
        (math.ceil(tokens / config.block_m), batch * heads)
    ](
        query,
        tables.chosen,
        tables.ones,
        statistics.sums,
        statistics.masses,
        statistics.s_0,
        statistics.z_0,
        division.value_mean if division else statistics.s_0,
        numerator,
        denominator,
        heads,
        tokens,
        head_dim,
        value_dim,
        tiles // tables.chunks,
        division.parts if division else 1,
        division.eps if division else 0.0,
        *query.stride()[:3],
        *numerator.stride()[:3],
        COMMON=tables.common,
        CHUNKS=tables.chunks,
        BLOCK_LIFTS=BLOCK // lifts,
        D=padded(head_dim),
        DV=width,
        F=chunk,
        L=lifts,
        LR=min(lifts, max(1, config.columns // width)),
        M=MASS_COLUMNS,
        BM=config.block_m,
        DIVIDE=division is not None,
        ROUND=division is not None and division.round_denominators,
        num_warps=config.read_warps,
        num_stages=config.read_stages,
    )
    return numerator, denominator
