"""Attention by tiles in Triton kernels, the same definition as `attend` in plain torch.

Phases: one pass over query, key and value that copies tiles and pools them; the spread of each
block; weights of the first-order terms and their product by cuBLAS; and the loop over query
tiles, exact tiles first, then pseudo-keys, in one online softmax. Every sum has a fixed order, so
equal inputs give equal bits.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..taylor.triton_support import interpreted
from ..token_layout import TokenLayout
from ..variant import Dense
from . import far, select
from .attend import Attended
from .options import Options
from .triton_job import Job, head_runs, kernels, make_job, triton_dtype
from .triton_plan import Config
from .triton_pool import Spread, TritonPooled, pool_tiles, spreads
from .triton_tables import FLAG_BITS

_WEIGH_QUERIES, _WEIGH_KEYS = 16, 64


def tiled_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    layout: TokenLayout,
    options: Options,
    *,
    log_mass_rows: torch.Tensor | None = None,
    dense: Dense | None = None,
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
        dense: attends text queries to all keys; None for torch's own, or the kernel.
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
        text = layout.text_tokens
        # Only the kernel knows the mass of text queries; SDPA is faster at the rest.
        if dense is None and mass is None and not job.config.text_in_kernel:
            dense = partial(torch.nn.functional.scaled_dot_product_attention, scale=scale)
        skips = dense is not None and mass is None
        for first, count in head_runs(job):
            attend_heads(job, first, count, skip_text=skips)
        if text and dense is not None:
            out[:, :, :text] = dense(query[:, :, :text], key, value)
    if mass is not None and log_mass_rows is not None:
        mass = mass.index_select(2, log_mass_rows)
    return Attended(out, mass)


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
    by_group = picks[:, own.clamp_min(0).long()]  # [G, P, R, K]
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
    kernels("triton_attend_kernels").weigh_kernel[(math.ceil(tiles / _WEIGH_QUERIES), heads)](
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
        OPERAND=triton_dtype(job.query.dtype),
        WIDE=triton_dtype(job.wide),
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
    kernels("triton_attend_kernels").attend_kernel[(table.groups.shape[0] - first_group, heads)](
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
        OPERAND=triton_dtype(job.query.dtype),
        WIDE=triton_dtype(job.wide),
        PRECISION=job.precision,
        num_warps=config.warps,
        num_stages=config.stages,
        **({"maxnreg": config.registers} if config.registers else {}),
    )  # fmt: skip
