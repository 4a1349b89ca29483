"""The first phases of the Triton path: tiles copied and pooled, and the spread of their keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..taylor.triton_support import multiprocessors
from .pool import sampled_slots
from .tiles import SLOTS
from .triton_job import Job, kernels, triton_dtype
from .triton_plan import PROGRAMS

_SHARE_BLOCKS = 8


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
    kernels("triton_pool_kernels").pool_kernel[(table.all_tiles, heads)](
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
        OPERAND=triton_dtype(dtype),
        WIDE=triton_dtype(job.wide),
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
    kernels("triton_pool_kernels").spread_kernel[(parts, heads)](
        pooled.near_key, pooled.key, table.live, partial, total, table.all_tiles, per_program,
        OPERAND=triton_dtype(query.dtype),
        # Two stages of float32 in three parts exceed the shared memory.
        num_stages=1 if query.dtype == torch.float32 else 2,
        **sampling,
        **same,
    )  # fmt: skip
    summed = partial.sum(dim=1)
    kernels("triton_pool_kernels").share_kernel[(steps, heads)](
        pooled.near_key, pooled.key, table.live, summed, share,
        1.0 / table.sampled, total, table.all_tiles,
        WIDE=triton_dtype(job.wide),
        **sampling,
        **same,
    )  # fmt: skip
    # Queries are sampled alike for blocks of any size.
    step, samples = _sampling(SLOTS)
    kernels("triton_pool_kernels").own_kernel[(math.ceil(table.tiles / _SHARE_BLOCKS), heads)](
        query, table.rows, summed, own, 0.5 * job.scale**2 / (samples * table.sampled),
        first, query.shape[1], table.tiles, query.shape[3], *query.stride()[:3],
        SAMPLE=step,
        SAMPLES=samples,
        WIDE=triton_dtype(job.wide),
        **same,
    )  # fmt: skip
    return Spread(share, own)
