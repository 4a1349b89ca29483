"""`projection.factors` in Triton: two launches per moment and one for all iterations.

In torch they are some hundred small launches, which take a GPU's host longer than everything
else of a call together.
"""

from __future__ import annotations

import math

import torch

from ..quality import sampled_indices
from .projection import ITERATIONS, SAMPLES, start
from .triton_plan import padded
from .triton_support import kernels

MAX_WIDTH = 128
MAX_RANK = 64
_BLOCK_T = 32
_SPLITS = 8


def _moment(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    root: float,
    parts: int,
    *,
    other_mean: torch.Tensor | None = None,
    other_root: float = 1.0,
) -> torch.Tensor:
    batch, heads, tokens, head_dim = x.shape
    width = head_dim // parts
    size = padded(width)
    rows, samples = batch * heads * parts, min(tokens, SAMPLES)
    # Few heads alone leave most of a GPU idle.
    splits = max(1, min(_SPLITS, samples // (4 * _BLOCK_T)))
    per_split = math.ceil(samples / (splits * _BLOCK_T)) * _BLOCK_T
    splits = math.ceil(samples / per_split)
    partial = x.new_empty(splits, rows, size, size, dtype=torch.float32)
    tops = x.new_empty(splits, rows, dtype=torch.float32)
    moment = x.new_empty(rows, size, size, dtype=torch.float32)
    sampled = tokens > SAMPLES
    module = kernels("triton_project_kernels")
    module.moment_kernel[(rows, splits)](
        x,
        mean if mean is not None else x,
        other_mean if other_mean is not None else x,
        sampled_indices(tokens, SAMPLES, 0, x.device) if sampled else x,
        partial,
        tops,
        heads,
        samples,
        per_split,
        width,
        root,
        other_root,
        *x.stride()[:3],
        PARTS=parts,
        W=size,
        BT=_BLOCK_T,
        CENTRE=mean is not None,
        WEIGHTED=other_mean is not None,
        SAMPLED=sampled,
        PRECISION=precision(x.dtype),
        num_warps=8,
    )
    module.moment_sum_kernel[(rows,)](partial, tops, moment, splits, W=size, num_warps=8)
    return moment


def precision(dtype: torch.dtype) -> str:
    """Of matrix products of what is prepared: fp32 for fp32 input, 11 bits are enough for 16."""
    return "ieee" if dtype == torch.float32 else "tf32"


def factors(
    query: torch.Tensor,
    key: torch.Tensor,
    rank: int,
    *,
    query_mean: torch.Tensor | None,
    key_mean: torch.Tensor | None,
    query_root: float,
    key_root: float,
    parts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`projection.factors` of slices of heads, of what they are after scale and centring.

    Args:
        query: ``[B, H, Nq, D]``, last dimension contiguous.
        key: ``[B, H, Nk, D]``, likewise.
        rank: r, up to `MAX_RANK`.
        query_mean: ``[B · H, D]`` fp32, of ``query``; None where it is not centred. The factor
            on the keys that it brings counts as their weight.
        key_mean: likewise, of ``key``.
        query_root: factor on the query.
        key_root: factor on the key.
        parts: slices of a head, each up to `MAX_WIDTH` wide.

    Returns:
        A and B, ``[B · H · parts, D / parts, r]`` fp32.
    """
    width = query.shape[3] // parts
    of_query = _moment(query, query_mean, query_root, parts)
    of_key = _moment(key, key_mean, key_root, parts, other_mean=query_mean, other_root=query_root)
    rows, size = of_query.shape[:2]
    a, b = (of_query.new_empty(rows, width, rank) for _ in range(2))
    kernels("triton_project_kernels").factors_kernel[(rows,)](
        of_query,
        of_key,
        start(width, rank, query.device, torch.float32),
        of_query.new_empty(rows, size, padded(rank)),
        a,
        b,
        width,
        rank,
        W=size,
        R=padded(rank),
        BK=min(32, size),
        ITERATIONS=ITERATIONS,
        # Subspaces turn by what is lost here, over and over.
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32x3",
        num_warps=8,
        num_stages=2,
    )
    return a, b
