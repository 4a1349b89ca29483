"""The fully fused Triton path of Taylor attention, for feature dimensions that fit in memory.

Two phases. The build sums ψ(k) vᵀ per head, split over keys where heads alone don't fill the
GPU; partial sums are added in a fixed order, so equal inputs give equal bits. The read applies
the sums to the queries. `triton_plan` describes the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import triton_cubic
from .triton_cubic import CubicStatistics
from .triton_cubic_plan import CubicConfig, cubic_config
from .triton_plan import (
    Division,
    FullConfig,
    base_layout,
    check_config,
    default_config,
    lift_layout,
    padded,
    pair_coordinates,
    refusal,
    selection,
    split_count,
)
from .triton_support import (
    check_inputs,
    interpreted,
    kernels,
    multiprocessors,
    operand_dtype,
    rows_contiguous,
    shared_memory,
)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Index and weight tables on the device; `triton_plan` says what each holds."""

    value_weights: torch.Tensor
    gradient_weights: torch.Tensor
    pair_value_weights: torch.Tensor | None
    pair_gradient_weights: torch.Tensor | None
    selections: torch.Tensor | None
    pairs: torch.Tensor | None
    tile_chunk: torch.Tensor | None
    tile_lift: torch.Tensor | None
    first: torch.Tensor | None
    count: torch.Tensor | None
    lift_weights: torch.Tensor | None


@lru_cache(maxsize=16)
def _tables(
    head_dim: int, terms: int, config: FullConfig, dtype: torch.dtype, device: torch.device
) -> _Tables:
    chunk = config.chunk
    with torch.inference_mode(False):
        single = base_layout(head_dim, 1, chunk)
        pair = base_layout(head_dim, 2, chunk) if terms >= 4 else None
        lift = (
            lift_layout(head_dim, terms - 2, chunk, config.build_lifts, config.lifts)
            if terms >= 3
            else None
        )
        return _Tables(
            value_weights=single.value_weights.to(device),
            gradient_weights=single.gradient_weights.to(device),
            pair_value_weights=pair.value_weights.to(device) if pair else None,
            pair_gradient_weights=pair.gradient_weights.to(device) if pair else None,
            selections=selection(head_dim, chunk).to(device, dtype) if pair else None,
            pairs=pair_coordinates(head_dim, chunk).to(device) if pair else None,
            tile_chunk=lift.tile_chunk.to(device) if lift else None,
            tile_lift=lift.tile_lift.to(device) if lift else None,
            first=lift.first.to(device) if lift else None,
            count=lift.count.to(device) if lift else None,
            lift_weights=lift.weights.to(device) if lift else None,
        )


@dataclass(frozen=True, slots=True)
class FullStatistics:
    """Sums over keys that the read needs; names follow the degree that they contribute to.

    Attributes:
        s_0: ``[BH, DV]`` fp32, Σ w v.
        s_1: ``[BH, chunks, chunk, DV]``, degree 1.
        s_2: ``[BH, pair chunks, chunk, DV]``, degree 2 where P is 4.
        s_top: ``[BH, tiles, chunk, lifts * DV]``, degree P - 1 where P is 3 or 4.
        z_0: ``[BH]`` fp32, Σ w.
        z_1: ``[BH, D]`` fp32, Σ w k.
        z_2: ``[BH, chunks, chunk, D]``: q · (q @ z_2) is the denominator's degree 2.
        z_3: ``[BH, pair chunks, chunk, D]``: q · (pairs(q) @ z_3) is its degree 3.
    """

    s_0: torch.Tensor
    s_1: torch.Tensor
    s_2: torch.Tensor | None
    s_top: torch.Tensor | None
    z_0: torch.Tensor
    z_1: torch.Tensor
    z_2: torch.Tensor
    z_3: torch.Tensor | None


class _Builder:
    """Launches of the build for one set of keys."""

    def __init__(
        self,
        key: torch.Tensor,
        weights: torch.Tensor | None,
        tables: _Tables,
        config: FullConfig,
        finite: bool,
    ) -> None:
        self.finite = finite
        self.key, self.tables, self.config = key, tables, config
        self.batch, self.heads, self.tokens, self.head_dim = key.shape
        self.operand = operand_dtype(key.dtype)
        self.weights = weights
        self.module = kernels("triton_full_kernels")

    def sums(
        self,
        value: torch.Tensor,
        factors: torch.Tensor,
        *,
        pairs: bool = False,
        lifted: bool = False,
        column_sum: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[BH, tiles, chunk, lifts * DV]`` in the operands' dtype, and Σ w v ``[BH, DV]``."""
        config, tables = self.config, self.tables
        tiles, lifts, chunk = factors.shape
        width = padded(value.shape[3])
        bh = self.batch * self.heads
        splits = split_count(tiles * bh, self.tokens, multiprocessors(value.device))
        # Rounded to whole steps of the kernel, so that only the last split is ragged.
        per_split = math.ceil(self.tokens / (splits * config.block_t)) * config.block_t
        splits = math.ceil(self.tokens / per_split)
        partial = value.new_empty(splits, bh, tiles, lifts * width, chunk, dtype=torch.float32)
        column = value.new_empty(splits, bh, width, dtype=torch.float32) if column_sum else None
        w = self.weights
        selections = tables.selections
        self.module.build_kernel[(tiles, bh, splits)](
            self.key,
            value,
            w if w is not None else self.key,
            selections if selections is not None else self.key,
            tables.tile_chunk if tables.tile_chunk is not None else self.key,
            tables.tile_lift if tables.tile_lift is not None else self.key,
            partial,
            column if column is not None else partial,
            self.heads,
            self.tokens,
            per_split,
            self.head_dim,
            value.shape[3],
            *self.key.stride()[:3],
            *value.stride()[:3],
            *(w.stride() if w is not None else (0, 0, 0)),
            D=padded(self.head_dim),
            DV=width,
            KC=chunk,
            L=lifts,
            BT=config.block_t,
            CHUNKS=tiles if pairs and not lifted else self._pair_chunks(),
            PAIRS=pairs,
            LIFTED=lifted,
            COLUMN_SUM=column_sum,
            WEIGHTED=w is not None,
            FINITE=self.finite,
            # From 64 rows on a product fills the tensor cores.
            WIDE=width > chunk and width >= 64,
            OPERAND=_triton_dtype(self.operand),
            PRECISION="ieee",
            num_warps=config.build_warps,
            num_stages=config.build_stages,
        )
        if lifted:
            # The rows of one tile are those of the read's tiles, one after the other.
            tiles, lifts = tiles * (lifts // config.lifts), config.lifts
        out = value.new_empty(bh, tiles, chunk, lifts * width, dtype=self.operand)
        self.module.reduce_kernel[(tiles, bh)](
            partial, factors, out, splits, DV=width, KC=chunk, L=lifts, num_warps=4
        )
        return out, column.sum(0) if column is not None else None

    def _pair_chunks(self) -> int:
        selections = self.tables.selections
        return selections.shape[1] if selections is not None else 1


def _triton_dtype(dtype: torch.dtype) -> object:
    language = kernels("triton_full_kernels").tl
    return language.float32 if dtype == torch.float32 else language.bfloat16


def chosen_config(
    head_dim: int, value_dim: int, terms: int, dtype: torch.dtype, shared_memory: int
) -> FullConfig | CubicConfig:
    """Tile sizes for these shapes, which choose the kernels too.

    ``shared_memory`` is in bytes, what the GPU gives a program.
    """
    cubic = None
    if terms == 4 and operand_dtype(dtype) != torch.float32:
        cubic = cubic_config(head_dim, shared_memory)
    return cubic or default_config(head_dim, value_dim, terms, dtype)


def build(
    key: torch.Tensor,
    value: torch.Tensor,
    terms: int,
    *,
    weights: torch.Tensor | None,
    config: FullConfig | CubicConfig,
    finite: bool = False,
) -> FullStatistics | CubicStatistics:
    """Phase A: sums over keys.

    Args:
        key: ``[B, H, Nk, d]``.
        value: ``[B, H, Nk, Dv]``.
        terms: P, 2 to 4.
        weights: ``[B, H, Nk]`` or None.
        config: tile sizes.
        finite: that key and value hold no NaN or infinity, also where the weight is 0.
    """
    if isinstance(config, CubicConfig):
        return triton_cubic.build(key, value, weights=weights, config=config, finite=finite)
    batch, heads, tokens, head_dim = key.shape
    tables = _tables(head_dim, terms, config, operand_dtype(key.dtype), key.device)
    builder = _Builder(key, weights, tables, config, finite)
    s_1, s_0 = builder.sums(value, tables.value_weights, column_sum=True)
    z_2, z_1 = builder.sums(key, tables.gradient_weights, column_sum=True)
    assert s_0 is not None and z_1 is not None
    if weights is None:
        z_0 = key.new_full((batch * heads,), float(tokens), dtype=torch.float32)
    else:
        z_0 = weights.sum(-1, dtype=torch.float32).reshape(batch * heads)
    s_2 = s_top = z_3 = None
    if tables.pair_value_weights is not None and tables.pair_gradient_weights is not None:
        s_2, _ = builder.sums(value, tables.pair_value_weights, pairs=True)
        z_3, _ = builder.sums(key, tables.pair_gradient_weights, pairs=True)
    if tables.lift_weights is not None:
        s_top, _ = builder.sums(value, tables.lift_weights, pairs=terms >= 4, lifted=True)
    return FullStatistics(s_0, s_1, s_2, s_top, z_0, z_1, z_2, z_3)


def read(
    query: torch.Tensor,
    statistics: FullStatistics | CubicStatistics,
    terms: int,
    value_dim: int,
    *,
    config: FullConfig | CubicConfig,
    division: Division | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase B: the sums applied to queries; arguments and results as in `sums`.

    With ``division``, its ``out`` and the denominators over the sum of the weights.
    """
    if isinstance(config, CubicConfig):
        assert isinstance(statistics, CubicStatistics)
        return triton_cubic.read(query, statistics, value_dim, config=config, division=division)
    assert isinstance(statistics, FullStatistics)
    batch, heads, tokens, head_dim = query.shape
    operand = operand_dtype(query.dtype)
    tables = _tables(head_dim, terms, config, operand, query.device)
    if division is None:
        numerator = query.new_empty(batch, heads, tokens, value_dim, dtype=torch.float32)
    else:
        numerator = division.out
    denominator = query.new_empty(batch, heads, tokens, 1, dtype=torch.float32)
    unused = statistics.s_1
    s_top = statistics.s_top
    kernels("triton_full_kernels").read_kernel[
        (math.ceil(tokens / config.block_m), batch * heads)
    ](
        query,
        tables.pairs if tables.pairs is not None else unused,
        statistics.s_0,
        statistics.s_1,
        statistics.s_2 if statistics.s_2 is not None else unused,
        s_top if s_top is not None else unused,
        statistics.z_0,
        statistics.z_1,
        statistics.z_2,
        statistics.z_3 if statistics.z_3 is not None else unused,
        tables.first if tables.first is not None else unused,
        tables.count if tables.count is not None else unused,
        division.value_mean if division else unused,
        numerator,
        denominator,
        heads,
        tokens,
        head_dim,
        value_dim,
        s_top.shape[1] if s_top is not None else 0,
        division.parts if division else 1,
        division.eps if division else 0.0,
        *query.stride()[:3],
        *numerator.stride()[:3],
        D=padded(head_dim),
        DV=padded(value_dim),
        KC=config.chunk,
        L=config.lifts,
        BM=config.block_m,
        TERMS=terms,
        COORDINATE_CHUNKS=tables.value_weights.shape[0],
        PAIR_CHUNKS=tables.pair_value_weights.shape[0]
        if tables.pair_value_weights is not None
        else 1,
        DIVIDE=division is not None,
        ROUND=division is not None and division.round_denominators,
        OPERAND=_triton_dtype(operand),
        PRECISION="ieee",
        num_warps=config.read_warps,
        num_stages=config.read_stages,
    )
    return numerator, denominator


def _constant(
    query: torch.Tensor, value: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """P = 1: every key counts its weight, for every query."""
    if weights is None:
        total = value.sum(2, keepdim=True, dtype=torch.float32)
        mass = total.new_full((*total.shape[:3], 1), float(value.shape[2]))
    else:
        w = weights[..., None].float()
        total = (torch.where(w == 0, 0.0, value.float()) * w).sum(2, keepdim=True)
        mass = w.sum(2, keepdim=True)
    shape = query.shape[:3]
    return (
        total.expand(*shape, -1).contiguous(),
        mass.expand(*shape, 1).contiguous(),
    )


def sums(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: int,
    *,
    weights: torch.Tensor | None = None,
    config: FullConfig | CubicConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of attention with exp cut below degree ``terms``.

    ``Σⱼ wⱼ T(q·kⱼ) vⱼ`` and ``Σⱼ wⱼ T(q·kⱼ)`` with ``T(x) = Σ_{p < P} xᵖ / p!``. fp32 input is
    multiplied in fp32 without tf32, fp16 and bf16 input in bf16 with fp32 sums.

    Args:
        query: ``[B, H, Nq, d]``, the share of the scale included; fp32, fp16 or bf16.
        key: ``[B, H, Nk, d]``, the share of the scale included.
        value: ``[B, H, Nk, Dv]``.
        terms: P, 1 to 4.
        weights: ``[B or 1, H or 1, Nk]``, a factor on each key's term; a key with weight 0 may
            hold anything, NaN too. None for 1.
        config: tile sizes; None chooses them from the shapes.

    Returns:
        Numerator ``[B, H, Nq, Dv]`` and denominator ``[B, H, Nq, 1]``, fp32.

    Raises:
        ValueError: shapes or dtypes that don't fit, or that this path refuses.
    """
    check_inputs(query, key, value, weights)
    reason = refusal(query.shape[3], value.shape[3], terms)
    if reason:
        raise ValueError(f"fully fused path: {reason}")
    if weights is not None:
        weights = weights.expand(key.shape[:3])
    if terms == 1:
        return _constant(query, value, weights)
    query, key, value = rows_contiguous(query), rows_contiguous(key), rows_contiguous(value)
    config = config or chosen_config(
        query.shape[3], value.shape[3], terms, query.dtype, shared_memory(query.device)
    )
    if isinstance(config, FullConfig):
        check_config(config, query.shape[3], value.shape[3], terms, operand_dtype(query.dtype))
    with torch.cuda.device(query.device if query.is_cuda and not interpreted() else -1):
        statistics = build(key, value, terms, weights=weights, config=config)
        return read(query, statistics, terms, value.shape[3], config=config)
