"""How much memory a call needs beside its input, at its peak, by path.

An estimate comes from shapes, dtypes and settings alone, before anything is allocated. It counts
the output, which is held as well.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch

from ..sums_paths import Path
from . import kernel
from .attend import Options, head_bytes
from .paths import TritonSums
from .plan import make_plan, stages
from .projection import SAMPLES
from .triton_memory import full_memory_bytes, streaming_memory_bytes
from .triton_stream import StreamConfig
from .triton_support import multiprocessors, operand_dtype, shared_memory


class Shape(NamedTuple):
    """Sizes of one call: ``[B, H, Nq, D]``, ``[B, H, Nk, D]`` and ``[B, H, Nk, Dv]``."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int


def _whole(
    path: Path, dtype: torch.dtype, terms: int, options: Options, head_dim: int, weighted: bool
) -> TritonSums | None:
    """The sums that do the whole call, as `attend.taylor_attention` finds them; None: none do."""
    if path == "torch" or weighted:
        return None
    sums = TritonSums(path, dtype, StreamConfig())
    return sums if sums.takes_whole(terms, options, head_dim) else None


def _heads_at_a_time(
    shape: Shape,
    dtype: torch.dtype,
    options: Options,
    device: torch.device,
    whole: TritonSums | None,
) -> int:
    """How many heads `attend.taylor_attention` holds copies of."""
    size = kernel.accumulation_dtype(dtype).itemsize
    sizes = shape[2:]
    if whole is not None:
        per_head = whole.whole_bytes(*sizes, options)
    else:
        per_head = head_bytes(*sizes, options, size)
    limit = kernel.budget(device).heads
    rows, some = next(kernel.head_groups(shape.batch, shape.heads, per_head, limit))
    count: int = (rows.stop - rows.start) * (some.stop - some.start)
    return count


def _torch_sums_bytes(
    shape: Shape,
    dtype: torch.dtype,
    terms: int,
    options: Options,
    device: torch.device,
    at_a_time: int,
) -> int:
    """Prepared copies and `kernel.sums` of the heads that are computed at a time."""
    queries, keys, head_dim, value_dim = shape[2:]
    size: int = kernel.accumulation_dtype(dtype).itemsize
    bounds, parts = kernel.budget(device), options.heads_per_head
    per_head = head_bytes(queries, keys, head_dim, value_dim, options, size)
    group = at_a_time * parts

    plan = make_plan(options.feature_width(head_dim), value_dim // parts, terms)
    row_bytes = group * plan.rows * size
    block = max(
        kernel.block_size(options.block_q, queries, row_bytes, bounds.block),
        kernel.block_size(options.block_k, keys, row_bytes, bounds.block),
    )
    most = max(
        sum(chunk.held for chunk in stage)
        for stage in stages(plan, kernel.stage_features(plan, group, size, bounds))
    )
    return at_a_time * per_head + row_bytes * block + group * plan.columns * most * size


def _triton_sums_bytes(
    path: Path,
    shape: Shape,
    dtype: torch.dtype,
    terms: int,
    options: Options,
    device: torch.device,
    stream: StreamConfig,
    at_a_time: int,
) -> int:
    """Prepared copies, those that the kernels take, and a Triton path of the same heads."""
    queries, keys, head_dim, value_dim = shape[2:]
    parts, slices = options.heads_per_head, 1
    width = options.feature_width(head_dim)
    if options.sub_head_mode == "shared":
        slices = options.sub_head_blocks
    size: int = kernel.accumulation_dtype(dtype).itemsize
    operand: int = operand_dtype(dtype).itemsize
    # Query and key of all slices, value, and the weights that centred queries bring.
    prepared = size * ((queries + keys) * width * slices * parts + keys * value_dim + keys * parts)
    taken = operand * ((queries + keys) * width * parts + keys * value_dim)
    group, columns = at_a_time * parts, value_dim // parts
    if path == "full":
        working = full_memory_bytes(
            group, queries, keys, width, columns, terms, dtype,
            processors=multiprocessors(device), shared_memory=shared_memory(device),
        )  # fmt: skip
    else:
        working = streaming_memory_bytes(
            group, queries, width, columns, terms, dtype, config=stream
        )
    earlier = 0
    if slices > 1:
        results = size * queries * (value_dim + 1)
        # The sums of the slices before; then degree 0 is taken off, from the values in float32.
        earlier = results
        unrounded = size * keys * value_dim if operand < size else 0
        working = max(working, at_a_time * (results + unrounded))
    return at_a_time * (prepared + taken + earlier) + working


def _whole_bytes(
    whole: TritonSums,
    shape: Shape,
    dtype: torch.dtype,
    terms: int,
    options: Options,
    device: torch.device,
    at_a_time: int,
) -> int:
    """What is prepared of the same heads, and their sums, for calls done by `WholeHeads`."""
    queries, keys, head_dim, value_dim = shape[2:]
    parts = options.heads_per_head
    prepared = whole.whole_bytes(queries, keys, head_dim, value_dim, options)
    return at_a_time * prepared + full_memory_bytes(
        at_a_time * parts, queries, keys, options.feature_width(head_dim), value_dim // parts,
        terms, dtype, processors=multiprocessors(device), shared_memory=shared_memory(device),
        divided=True,
    )  # fmt: skip


def _projecting_bytes(shape: Shape, dtype: torch.dtype, options: Options, at_a_time: int) -> int:
    """Copies while the features of the same heads are projected; 0 where they are not."""
    queries, keys, head_dim, value_dim = shape[2:]
    parts = options.heads_per_head
    rank = options.rank(head_dim)
    if not rank:
        return 0
    copies = (queries + keys) * (head_dim + rank * parts)
    sampled = 3 * min(max(queries, keys), SAMPLES) * head_dim
    held = (queries + keys) * head_dim + sampled
    size: int = kernel.accumulation_dtype(dtype).itemsize
    return at_a_time * size * (max(copies, held) + keys * value_dim)


def working_bytes(
    path: Path,
    shape: Shape,
    dtype: torch.dtype,
    terms: int,
    options: Options,
    device: torch.device,
    *,
    stream: StreamConfig | None = None,
    weighted: bool = False,
) -> int:
    """Peak of what a call allocates, in bytes, its output included and its input not.

    Args:
        path: ``"torch"``, ``"streaming"`` or ``"full"``, that computes the sums.
        shape: of the call.
        dtype: of query, key and value.
        terms: P.
        options: of the expansion.
        device: where it runs; block sizes and splits over keys depend on it.
        stream: chunks of the streaming path, which bound its memory; None for its defaults.
        weighted: whether the call has weights of its own, as a mask makes.

    Raises:
        ValueError: the path is unknown, or the sub-head blocks don't fit the head.
    """
    if path not in get_args(Path):
        raise ValueError(f"path: {path!r} is not allowed; allowed: {', '.join(get_args(Path))}")
    whole = _whole(path, dtype, terms, options, shape.head_dim, weighted)
    at_a_time = _heads_at_a_time(shape, dtype, options, device, whole)
    projecting = 0
    if whole is not None:
        summing = _whole_bytes(whole, shape, dtype, terms, options, device, at_a_time)
    else:
        projecting = _projecting_bytes(shape, dtype, options, at_a_time)
        if path == "torch":
            summing = _torch_sums_bytes(shape, dtype, terms, options, device, at_a_time)
        else:
            summing = _triton_sums_bytes(
                path, shape, dtype, terms, options, device, stream or StreamConfig(), at_a_time
            )
    size: int = kernel.accumulation_dtype(dtype).itemsize
    columns = shape.value_dim * dtype.itemsize + options.heads_per_head * size
    kept = shape.batch * shape.heads * shape.queries * columns
    peak: int = kept + max(summing, projecting)
    return peak
