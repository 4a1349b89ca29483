"""Attention by tiles in Triton kernels, the same definition as `attend` in plain torch.

Phases: one pass over query, key and value that copies tiles and pools them; the spread of each
block; weights of the first-order terms and their product by cuBLAS; and the loop over query
tiles, exact tiles first, then pseudo-keys, in one online softmax. Every sum has a fixed order, so
equal inputs give equal bits.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from ..taylor.triton_support import (
    check_inputs,
    interpreted,
    multiprocessors,
    rows_contiguous,
)
from ..token_layout import TokenLayout
from . import far, select
from .attend import Attended
from .options import Options, picked_tiles, window_tiles
from .pool import sampled_slots
from .tiles import SLOTS, tile_count
from .triton_plan import (
    PROGRAMS,
    Config,
    Sizes,
    default_config,
    heads_together,
    padded,
    refusal,
    wide_dtype,
)
from .triton_tables import FLAG_BITS, Tables, tables

_SHARE_BLOCKS = 8
_WEIGH_QUERIES, _WEIGH_KEYS = 16, 64


def _kernels() -> ModuleType:
    return importlib.import_module(".triton_kernels", __package__)


def _triton_dtype(dtype: torch.dtype) -> object:
    return getattr(_kernels().tl, str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class Job:
    """What is the same for all heads of a call.

    Attributes:
        query: ``[B, H, N, D]``, last dimension contiguous, as are the next two.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, Dv]``.
        out: ``[B, H, N, Dv]``, to be filled.
        mass: ``[B, H, N]`` float32, to be filled; None where not wanted.
        scale: factor on q·k.
        tables: of the layout.
        options: of the approximation.
        picks: tiles that each query tile picks beside its window.
        has_far: whether any tile is not exact for any other.
        config: tile sizes.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    mass: torch.Tensor | None
    scale: float
    tables: Tables
    options: Options
    picks: int
    has_far: bool
    config: Config

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.query.dtype)

    @property
    def widths(self) -> tuple[int, int]:
        """Padded widths of key and value."""
        return padded(self.query.shape[3]), padded(self.value.shape[3])

    @property
    def blocks(self) -> int:
        """Blocks of a tile."""
        return SLOTS // self.options.block

    @property
    def precision(self) -> str:
        """Of products of float32: three tf32 ones, about 2⁻²¹. Others ignore it."""
        return "tf32x3"


@dataclass(frozen=True, slots=True)
class TritonPooled:
    """Tiles of G heads, copied and pooled. Widths are padded; names as in `pool.Pooled`.

    Attributes:
        near_key: ``[G, A, 64, D]``, dead slots 0.
        near_value: ``[G, A, 64, Dv]``.
        query: ``[G, T, D]`` float32, the scale in it.
        key: ``[G, M, D]`` in the input's dtype.
        value: ``[G, M, Dv]``.
        cross: ``[G, T, D·Dv]``, H divided by the tile's live slots; bf16, or float32.
        norm: ``[G, T]`` float32, ‖H‖.
    """

    near_key: torch.Tensor
    near_value: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cross: torch.Tensor | None
    norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Spread:
    """What the correction of masses is made of.

    Attributes:
        share: ``[G, M]`` float32, s of each block.
        own: ``[G, T]`` float32, mean of ½·qᵀΣ̄q over each tile's queries.
    """

    share: torch.Tensor
    own: torch.Tensor


def tiled_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    layout: TokenLayout,
    options: Options,
    *,
    log_mass_rows: torch.Tensor | None = None,
    config: Config | None = None,
) -> Attended:
    """As `attend.tiled_attention`, for float32, float16 and bfloat16.

    16-bit inputs are multiplied as they are and weights rounded to their dtype; the first-order
    terms and Σ̄ are rounded to bf16. Sums are float32. float32 inputs are multiplied in three
    tf32 products.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, Dv]``.
        scale: factor on q·k, above 0.
        layout: of the N tokens, with a grid at least.
        options: how to approximate.
        log_mass_rows: ``[S]`` int64 on the query's device: of `Attended.log_mass`.
        config: tile sizes; None chooses them.

    Raises:
        ValueError: shapes, dtypes or a scale that this path does not take.
    """
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    mass = None
    if log_mass_rows is not None:
        mass = query.new_empty(query.shape[:3], dtype=torch.float32)
    with torch.cuda.device(query.device if query.is_cuda and not interpreted() else -1):
        job = make_job(query, key, value, out, mass, scale, layout, options, config)
        # Only the kernel knows the mass of text queries; SDPA is faster at the rest.
        dense = layout.text_tokens > 0 and mass is None and not job.config.text_in_kernel
        if dense:
            text = layout.text_tokens
            out[:, :, :text] = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, :text], key, value, scale=scale
            )
        for first, count in head_runs(job):
            attend_heads(job, first, count, skip_text=dense)
    if mass is not None and log_mass_rows is not None:
        mass = mass.index_select(2, log_mass_rows)
    return Attended(out, mass)


def make_job(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    mass: torch.Tensor | None,
    scale: float,
    layout: TokenLayout,
    options: Options,
    config: Config | None,
) -> Job:
    """Check a call and settle what all its heads share; arguments as `tiled_attention_triton`'s.

    Raises:
        ValueError: shapes, dtypes or a scale that this path does not take.
    """
    check_inputs(query, key, value, None)
    tokens = query.shape[2]
    if layout.tokens != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"layout: holds {layout.tokens} tokens; allowed: those of query ({tokens}) and key "
            f"({key.shape[2]})"
        )
    if not layout.grids:
        raise ValueError("layout: holds no grid; allowed: one or more")
    reason = refusal(query.dtype, query.shape[3], value.shape[3], scale)
    if reason:
        raise ValueError(f"Triton path: {reason}")
    picks = picked_tiles(tile_count(layout), layout, options)
    config = config or default_config(query.dtype)
    table = tables(layout, options.radius, options.block, config.together, query.device)
    least = min(window_tiles(grid, options.radius) for grid in layout.grids)
    return Job(
        rows_contiguous(query), rows_contiguous(key), rows_contiguous(value), out, mass,
        scale, table, options, picks, picks > 0 or least < table.tiles, config,
    )  # fmt: skip


def head_runs(job: Job) -> Iterator[tuple[int, int]]:
    """First head and number of heads that are computed at a time, of the B·H."""
    total = job.query.shape[0] * job.query.shape[1]
    table = job.tables
    sizes = Sizes(table.tiles, table.all_tiles, table.shared, *job.widths)
    step = heads_together(sizes, total, job.query.dtype, job.options, job.picks)
    for first in range(0, total, step):
        yield first, min(step, total - first)


def attend_heads(job: Job, first: int, count: int, *, skip_text: bool) -> None:
    """All phases for heads ``first`` to ``first + count`` of the B·H."""
    pooled = pool_tiles(job, first, count)
    spread, terms = None, None
    exact, picked = job.tables.exact, None
    if job.has_far:
        if job.options.correction:
            spread = spreads(job, first, pooled)
        if job.picks:
            exact, picked = pick_tiles(job, pooled, spread)
        if job.options.first_order:
            terms = add_terms(weigh(job, pooled, spread, exact), pooled)
    loop(job, first, pooled, spread, terms, exact, picked, skip_text=skip_text)


def pool_tiles(job: Job, first: int, heads: int) -> TritonPooled:
    """Phase 0: copies, means and products of ``heads`` heads from ``first`` on."""
    table, options = job.tables, job.options
    width, value_width = job.widths
    tiles, blocks = table.tiles, job.blocks
    new, dtype = job.query.new_empty, job.query.dtype
    near_key = new(heads, table.all_tiles, SLOTS, width)
    near_value = new(heads, table.all_tiles, SLOTS, value_width)
    needs_cross = job.has_far and (options.first_order or job.picks > 0)
    query = key = value = cross = norm = near_key
    if job.has_far:
        query = new(heads, tiles, width, dtype=torch.float32)
        key = new(heads, tiles * blocks, width)
        value = new(heads, tiles * blocks, value_width)
    if needs_cross:
        cross = new(heads, tiles, width * value_width, dtype=job.wide)
        norm = new(heads, tiles, dtype=torch.float32)
    _kernels().pool_kernel[(table.all_tiles, heads)](
        job.query, job.key, job.value, table.rows, table.live,
        near_key, near_value, query, key, value, cross, norm,
        first, job.query.shape[1], tiles, table.all_tiles, job.scale,
        job.query.shape[3], job.value.shape[3],
        *job.query.stride()[:3], *job.key.stride()[:3], *job.value.stride()[:3],
        D=width,
        DV=value_width,
        BLOCKS=blocks,
        POOLED=job.has_far,
        CROSS=needs_cross,
        OPERAND=_triton_dtype(dtype),
        WIDE=_triton_dtype(job.wide),
        PRECISION=job.precision,
        num_warps=job.config.pool_warps,
    )  # fmt: skip
    return TritonPooled(
        near_key, near_value, query, key, value,
        cross if needs_cross else None,
        norm if needs_cross else None,
    )  # fmt: skip


def _sampling(block: int) -> tuple[int, int]:
    """Every which slot of a block is sampled, and how many that makes."""
    slots = sampled_slots(block)
    step = int(slots[1] - slots[0])
    return step, -(-block // step)


def spreads(job: Job, first: int, pooled: TritonPooled) -> Spread:
    """Phase 1: the spread of keys, in one matrix a head and a number for each block and tile."""
    table, query = job.tables, job.query
    heads, width = pooled.near_key.shape[0], job.widths[0]
    total = table.tiles * job.blocks
    new = pooled.query.new_empty
    share, own = new(heads, total), new(heads, table.tiles)
    steps = math.ceil(total / _SHARE_BLOCKS)
    parts = min(steps, math.ceil(PROGRAMS * multiprocessors(query.device) / heads))
    per_program = math.ceil(steps / parts) * _SHARE_BLOCKS
    parts = math.ceil(total / per_program)
    partial = new(heads, parts, width, width)
    step, samples = _sampling(job.options.block)
    same = {"D": width, "BB": _SHARE_BLOCKS, "PRECISION": job.precision, "num_warps": 8}
    sampling = {"BLOCKS": job.blocks, "SAMPLE": step, "SAMPLES": samples}
    _kernels().spread_kernel[(parts, heads)](
        pooled.near_key, pooled.key, table.live, partial, total, table.all_tiles, per_program,
        OPERAND=_triton_dtype(query.dtype),
        **sampling,
        **same,
    )  # fmt: skip
    summed = partial.sum(dim=1)
    _kernels().share_kernel[(steps, heads)](
        pooled.near_key, pooled.key, table.live, summed, share,
        1.0 / table.sampled, total, table.all_tiles,
        WIDE=_triton_dtype(job.wide),
        **sampling,
        **same,
    )  # fmt: skip
    # Queries are sampled alike for blocks of any size.
    step, samples = _sampling(SLOTS)
    _kernels().own_kernel[(math.ceil(table.tiles / _SHARE_BLOCKS), heads)](
        query, table.rows, summed, own, 0.5 * job.scale**2 / (samples * table.sampled),
        first, query.shape[1], table.tiles, query.shape[3], *query.stride()[:3],
        SAMPLE=step,
        SAMPLES=samples,
        WIDE=_triton_dtype(job.wide),
        **same,
    )  # fmt: skip
    return Spread(share, own)


def pick_tiles(
    job: Job, pooled: TritonPooled, spread: Spread | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase 1b: exact tiles ``[G, T, T]`` uint8, and the picked ones in groups' lists."""
    assert pooled.norm is not None
    table = job.tables
    logits = torch.matmul(pooled.query, pooled.key.float().transpose(-2, -1))
    logits += table.log_count * math.log(2.0)
    if spread is not None:
        corrected = far.correction_of(spread.own, spread.share)
        logits += corrected[0]
    excluded = torch.zeros_like(table.exact, dtype=torch.float32)
    excluded.masked_fill_(table.exact.bool(), -math.inf)
    picks = select.pick(logits, pooled.norm, excluded, job.picks)
    exact = table.exact.expand(picks.shape[0], -1, -1).scatter(2, picks, 1)
    groups = table.groups
    # Text has no picks; what stands in its place is never read.
    own = torch.where(groups < table.tiles, groups, -1)
    by_group = picks[:, own.clamp_min(0)]  # [G, P, R, K]
    bits = 2 ** torch.arange(own.shape[1], device=own.device) * (own >= 0)
    listed = by_group * FLAG_BITS + bits.unsqueeze(-1)
    return exact, listed.flatten(2).to(torch.int32)


def weigh(
    job: Job, pooled: TritonPooled, spread: Spread | None, exact: torch.Tensor
) -> torch.Tensor:
    """Phase 2a: weights of the first-order terms, ``[G, T / n, T]``, n tiles sharing each row."""
    table = job.tables
    heads, tiles = pooled.query.shape[:2]
    # cuBLAS is slow where rows are not aligned to 16 bytes.
    columns = math.ceil(tiles / 8) * 8
    weights = pooled.query.new_empty(heads, tiles // table.shared, columns, dtype=job.wide)
    _kernels().weigh_kernel[(math.ceil(tiles / _WEIGH_QUERIES), heads)](
        pooled.query, pooled.key, table.log_count,
        spread.own if spread is not None else pooled.query,
        spread.share if spread is not None else pooled.query,
        exact, weights, tiles, tiles * job.blocks, columns, _per_head(exact),
        D=job.widths[0],
        BQ=_WEIGH_QUERIES,
        BN=_WEIGH_KEYS,
        BLOCKS=job.blocks,
        CORRECTION=spread is not None,
        BEND=far.BEND,
        MOST=far.MOST,
        DAMPING=far.DAMPING,
        OPERAND=_triton_dtype(job.query.dtype),
        WIDE=_triton_dtype(job.wide),
        SPLIT=job.query.dtype != torch.float32,
        SHARED=table.shared,
        PRECISION=job.precision,
        num_warps=4,
    )  # fmt: skip
    return weights[:, :, :tiles]


def _per_head(exact: torch.Tensor) -> int:
    """Step from head to head; 0 where all share one."""
    return exact.stride(0) if exact.shape[0] > 1 else 0


def add_terms(weights: torch.Tensor, pooled: TritonPooled) -> torch.Tensor:
    """Phase 2b: Σ_b w_b·C_b of n query tiles each, ``[G, T / n, D·Dv]``."""
    assert pooled.cross is not None
    return torch.bmm(weights, pooled.cross)


def loop(
    job: Job,
    first: int,
    pooled: TritonPooled,
    spread: Spread | None,
    terms: torch.Tensor | None,
    exact: torch.Tensor,
    picked: torch.Tensor | None,
    *,
    skip_text: bool,
) -> None:
    """Phase 3: fill the rows of ``out``, and of ``mass``, of G heads from ``first`` on."""
    table, config = job.tables, job.config
    heads = pooled.near_key.shape[0]
    width, value_width = job.widths
    first_group = table.text_groups if skip_text else 0
    unused = pooled.near_key
    mass = job.mass
    _kernels().attend_kernel[(table.groups.shape[0] - first_group, heads)](
        job.query, job.out, mass if mass is not None else unused,
        pooled.near_key, pooled.near_value, pooled.key, pooled.value, table.log_count,
        spread.share if spread is not None else unused,
        spread.own if spread is not None else unused,
        terms if terms is not None else unused,
        exact, table.rows, table.live, table.groups, table.starts, table.counts, table.listed,
        picked if picked is not None else table.listed,
        first, job.query.shape[1], table.tiles, table.all_tiles, table.tiles * job.blocks,
        first_group, job.picks, job.scale, job.query.shape[3], job.value.shape[3],
        _per_head(exact),
        *job.query.stride()[:3], *job.out.stride()[:3],
        *(mass.stride()[:2] if mass is not None else (0, 0)),
        D=width,
        DV=value_width,
        TILES=config.together,
        BN=config.far_block,
        BLOCKS=job.blocks,
        FULL=table.full,
        FAR=job.has_far,
        PICKS=picked is not None,
        CORRECTION=spread is not None,
        FIRST_ORDER=terms is not None,
        SHARED=table.shared,
        MASS=mass is not None,
        BEND=far.BEND,
        MOST=far.MOST,
        OPERAND=_triton_dtype(job.query.dtype),
        WIDE=_triton_dtype(job.wide),
        PRECISION=job.precision,
        num_warps=config.warps,
        num_stages=config.stages,
        **({"maxnreg": config.registers} if config.registers else {}),
    )  # fmt: skip
