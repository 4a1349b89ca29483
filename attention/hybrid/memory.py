"""How much memory a call needs beside its input, at its peak."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..taylor import kernel
from ..taylor.features import degree_dim, feature_dim
from ..taylor.plan import make_plan, stages
from . import near
from .attend import Form, heads_at_a_time, windows
from .basis import rows_at_a_time


class Shape(NamedTuple):
    """Sizes of one call: query and key ``[B, H, N, D]``, value ``[B, H, N, Dv]``."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    value_dim: int


def working_bytes(
    shape: Shape, dtype: torch.dtype, form: Form, device: torch.device, *, fits: bool
) -> int:
    """Peak of what a call allocates, in bytes, its output included and its input not.

    An estimate from shapes alone, before anything is allocated.

    Args:
        shape: of the call.
        dtype: of query, key and value.
        form: of the call.
        device: where it runs; how many heads are computed at a time depends on it.
        fits: whether coordinates are chosen, rather than the first ones kept.
    """
    batch, heads, tokens, head_dim, value_dim = shape
    size: int = kernel.accumulation_dtype(dtype).itemsize
    rows = batch * heads
    kept = rows * tokens * (value_dim * dtype.itemsize + size)
    image, additive = tokens - form.prefix, form.combine == "additive"
    near_keys, copied = _window(image, form)
    every_head = near.working_bytes(rows, form.prefix, tokens, head_dim, value_dim, dtype, device)
    if additive or form.weight == 0.0:
        every_head = max(
            every_head, _near_bytes(shape, rows, near_keys, copied, form, dtype, device)
        )
    if form.weight == 0.0:
        return kept + every_head
    means = 4 * rows * head_dim * size
    if fits:
        every_head = max(every_head, means + _fit_bytes(shape, dtype, form.rank, device))
    seen = shape._replace(tokens=tokens if additive else image)
    group = heads_at_a_time(batch, heads, seen.tokens, value_dim, form, dtype, device)
    narrow = size if form.wide else dtype.itemsize
    low = _low_bytes(seen, group, form.rank, narrow, size)
    if additive:
        after = _second_bytes(seen, group, form, narrow, size, device)
    else:
        after = _sums_bytes(shape, group, near_keys, copied, form, dtype, device)
    basis = 2 * heads * head_dim * form.rank * (narrow if fits else 0)
    lowering = _lowering_bytes(seen, group, form.rank, dtype.itemsize, narrow, size)
    return kept + max(every_head, means + basis + max(lowering, low + after))


def _window(image: int, form: Form) -> tuple[int, int]:
    """Most keys that a block sees exactly, and most that have to be copied together for one."""
    keys = copied = 0
    for _, first, last in windows(image, form):
        keys = max(keys, form.prefix + last - first)
        # The first blocks' windows adjoin the text.
        if first > 0 and form.prefix > 0:
            copied = max(copied, form.prefix + last - first)
    return keys, copied


def _near_bytes(
    shape: Shape, rows: int, keys: int, copied: int, form: Form, dtype: torch.dtype,
    device: torch.device,
) -> int:  # fmt: skip
    """One block of queries and what it sees exactly."""
    _, _, _, head_dim, value_dim = shape
    chunk = min(form.chunk, shape.tokens - form.prefix)
    copies = copied * (head_dim + value_dim) * dtype.itemsize * rows
    return copies + near.working_bytes(rows, chunk, keys, head_dim, value_dim, dtype, device)


def _fit_bytes(shape: Shape, dtype: torch.dtype, rank: int, device: torch.device) -> int:
    """Samples and second moments of `basis.fit`, and the iteration."""
    _, heads, tokens, head_dim, _ = shape
    size: int = kernel.accumulation_dtype(dtype).itemsize
    rows = min(tokens, rows_at_a_time(heads, head_dim, size, device))
    wide = dtype.itemsize < size
    sampled = rows * head_dim * (size * (2 if wide else 1) + dtype.itemsize)
    return heads * (sampled + size * (3 * head_dim**2 + 6 * head_dim * rank))


def _low_bytes(shape: Shape, group: int, rank: int, narrow: int, size: int) -> int:
    """`far.Low` of some heads."""
    return group * shape.tokens * (narrow * (2 * rank + shape.value_dim + 1) + size)


def _lowering_bytes(
    shape: Shape, group: int, rank: int, given: int, narrow: int, size: int
) -> int:
    """The peak of `far.lower`: weighted values, or query and key without their means."""
    _, _, tokens, head_dim, value_dim = shape
    columns = value_dim + 1
    few = 4 * size
    weighing = size * (value_dim + columns)
    # The projected query, and the key's before and after its norm changes.
    centred = narrow * columns + size * (head_dim + 2 * rank)
    converted = size * head_dim * (2 if given < size else 1)
    return group * tokens * (few + max(weighing, centred, converted))


def _features_bytes(group: int, tokens: int, form: Form, narrow: int) -> int:
    """The peak of `monomials.monomials`."""
    features = feature_dim(form.rank, form.terms)
    top = degree_dim(form.rank, form.terms - 1) if form.terms > 2 else 0
    return group * tokens * narrow * max(2 * features, features + 2 * top)


def _sums_bytes(
    shape: Shape, group: int, keys: int, copied: int, form: Form, dtype: torch.dtype,
    device: torch.device,
) -> int:  # fmt: skip
    """`far.FarSums` beside it, and what is joined with a block's exact part."""
    size: int = kernel.accumulation_dtype(dtype).itemsize
    narrow = size if form.wide else dtype.itemsize
    chunk = min(form.chunk, shape.tokens - form.prefix)
    features, columns = feature_dim(form.rank, form.terms), shape.value_dim + 1
    one = group * features * columns
    building = _features_bytes(group, chunk, form, narrow)
    adding = max(building, group * chunk * features * narrow + one * (narrow + size))
    exact = group * chunk * (shape.value_dim * dtype.itemsize + size)
    seen = one * size
    reading = group * chunk * features * narrow
    reading += one * narrow if narrow < size else 0
    reading += group * chunk * columns * (size + max(narrow, 2 * size))
    joining = 5 * group * chunk * shape.value_dim * size
    carried = group * chunk * shape.value_dim * (dtype.itemsize + size)
    carried += group * chunk * shape.value_dim * size if dtype.itemsize < size else 0
    block = exact + carried + max(seen + max(building, reading), joining)
    attending = carried + _near_bytes(shape, group, keys, copied, form, dtype, device)
    return 2 * one * size + max(adding, block, attending)


def _second_bytes(
    shape: Shape, group: int, form: Form, narrow: int, size: int, device: torch.device
) -> int:
    """`kernel.sums` of the additive form's own attention, and its sum with the local one."""
    tokens, columns = shape.tokens, shape.value_dim + 2
    bounds = kernel.budget(device)
    per_head = size * 2 * tokens * (form.rank + columns)
    together = max(1, min(group, bounds.heads // max(1, per_head)))
    plan = make_plan(form.rank, columns - 1, form.terms)
    row_bytes = together * plan.rows * size
    block = kernel.block_size(0, tokens, row_bytes, bounds.block)
    most = max(
        sum(chunk.held for chunk in stage)
        for stage in stages(plan, kernel.stage_features(plan, together, size, bounds))
    )
    prepared = together * size * tokens * (2 * form.rank + 2 * columns)
    working = row_bytes * block + together * plan.columns * most * size
    both = group * size * tokens * columns
    adding = group * size * tokens * 3 * shape.value_dim
    return both + max(prepared + working, adding)
