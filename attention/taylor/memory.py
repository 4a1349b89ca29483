"""How much memory a call needs beside its input, at its peak, by path.

An estimate comes from shapes, dtypes and settings alone, before anything is allocated. It counts
the output, which is held as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import kernel
from .attend import Options, head_bytes
from .plan import make_plan, stages
from .projection import SAMPLES


class Shape(NamedTuple):
    """Sizes of one call: ``[B, H, Nq, D]``, ``[B, H, Nk, D]`` and ``[B, H, Nk, Dv]``."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int


def _torch_bytes(
    shape: Shape, dtype: torch.dtype, terms: int, options: Options, device: torch.device
) -> int:
    """The plain torch path: `attend.taylor_attention` with `kernel.sums`."""
    batch, heads, queries, keys, head_dim, value_dim = shape
    size: int = kernel.accumulation_dtype(dtype).itemsize
    bounds, parts = kernel.budget(device), options.heads_per_head
    per_head = head_bytes(queries, keys, head_dim, value_dim, options, size)
    groups = kernel.head_groups(batch, heads, per_head, bounds.heads)
    rows, some = next(groups)
    at_a_time = (rows.stop - rows.start) * (some.stop - some.start)
    group = at_a_time * parts

    plan = make_plan(options.feature_width(head_dim), value_dim // parts, terms)
    row_bytes = group * plan.rows * size
    block = max(
        kernel.block_size(options.block_q, queries, row_bytes, bounds.block),
        kernel.block_size(options.block_k, keys, row_bytes, bounds.block),
    )
    most = max(
        sum(chunk.features for chunk in stage)
        for stage in stages(plan, kernel.stage_features(plan, group, size, bounds))
    )
    summing = at_a_time * per_head + row_bytes * block + group * plan.columns * most * size

    projecting = 0
    width = head_dim // parts
    if 0 < options.feature_projection < width:
        copies = (queries + keys) * (head_dim + options.feature_projection * parts)
        sampled = 3 * min(max(queries, keys), SAMPLES) * head_dim
        held = (queries + keys) * head_dim + sampled
        projecting = at_a_time * size * (max(copies, held) + keys * value_dim)

    kept = batch * heads * queries * (value_dim * dtype.itemsize + parts * size)
    peak: int = kept + max(summing, projecting)
    return peak


_PATHS: dict[str, Callable[[Shape, torch.dtype, int, Options, torch.device], int]] = {
    "torch": _torch_bytes
}
"""A path that computes the sums another way adds its name and its estimate here."""


def working_bytes(
    path: str,
    shape: Shape,
    dtype: torch.dtype,
    terms: int,
    options: Options,
    device: torch.device,
) -> int:
    """Peak of what a call allocates, in bytes, its output included and its input not.

    Args:
        path: ``"torch"``.
        shape: of the call.
        dtype: of query, key and value.
        terms: P.
        options: of the expansion.
        device: where it runs; automatic block sizes depend on it.

    Raises:
        ValueError: the path is unknown, or the sub-head blocks don't fit the head.
    """
    if path not in _PATHS:
        raise ValueError(f"path: {path!r} is not allowed; allowed: {', '.join(sorted(_PATHS))}")
    return _PATHS[path](shape, dtype, terms, options, device)
