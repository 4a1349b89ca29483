"""Device memory that the Triton paths take, from shapes alone.

Counted is what a path allocates for one call: sums, partial sums, tables and the fp32 results.
Query, key and value are the caller's.
"""

from __future__ import annotations

import math

import torch

from .features import degree_dim, feature_dim
from .triton_cubic_plan import MASS_COLUMNS, CubicConfig, cubic_layout
from .triton_full import chosen_config
from .triton_plan import FullConfig, lifted_rows, padded, split_count
from .triton_stream import StreamConfig, chunk_features, value_columns
from .triton_support import operand_dtype

_FP32 = 4


def _results(batch_heads: int, queries: int, value_dim: int) -> int:
    return batch_heads * queries * (value_dim + 1) * _FP32


def full_memory_bytes(
    batch_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int,
    terms: int,
    dtype: torch.dtype,
    *,
    processors: int = 132,
    shared_memory: int = 227 * 1024,
    config: FullConfig | CubicConfig | None = None,
    divided: bool = False,
) -> int:
    """Peak of what `triton_full.sums` allocates, in bytes.

    The sums are built one after the other, each from partial sums that go again; the results come
    when all partial sums are gone.

    Args:
        batch_heads: B · H, sub-heads counted.
        queries: Nq.
        keys: Nk.
        head_dim: d.
        value_dim: Dv.
        terms: P, 1 to 4.
        dtype: of the input.
        processors: the GPU's multiprocessors, on which the split over keys depends.
        shared_memory: bytes of it that the GPU gives a program, on which tile sizes depend.
        config: tile sizes; None for those that `triton_full.sums` chooses.
        divided: the read writes finished attention into the caller's tensor, so that of the
            results only denominators count.
    """
    results = _results(batch_heads, queries, 0 if divided else value_dim)
    if terms == 1:
        # Values in fp32, and again with their weights.
        return results + 2 * batch_heads * keys * value_dim * _FP32
    config = config or chosen_config(head_dim, value_dim, terms, dtype, shared_memory)
    operand = operand_dtype(dtype).itemsize
    if isinstance(config, CubicConfig):
        tiles, chunk, lifts = cubic_layout(head_dim, value_dim, config.chunk).weights.shape
        elements = batch_heads * tiles * chunk * (lifts * padded(value_dim) + MASS_COLUMNS)
        splits = split_count(tiles * batch_heads, keys, processors)
        return elements * operand + max(splits * elements * _FP32, results)
    held, peak = 0, 0

    def build(tiles: int, rows: int, columns: int) -> None:
        nonlocal held, peak
        elements = batch_heads * rows * columns
        splits = split_count(tiles * batch_heads, keys, processors)
        held += elements * operand
        peak = max(peak, held + splits * elements * _FP32)

    for degree in range(1, max(2, terms - 1)):
        tiles = math.ceil(degree_dim(head_dim, degree) / config.chunk)
        for columns in (padded(value_dim), padded(head_dim)):
            build(tiles, tiles * config.chunk, columns)
    rows = lifted_rows(head_dim, terms, config)
    if rows:
        build(rows // (config.chunk * config.build_lifts), rows, padded(value_dim))
    return max(peak, held + results)


def streaming_memory_bytes(
    batch_heads: int,
    queries: int,
    head_dim: int,
    value_dim: int,
    terms: int,
    dtype: torch.dtype,
    *,
    config: StreamConfig | None = None,
) -> int:
    """Bytes of `triton_stream.sums`: one chunk's sums, whatever R is, and the results."""
    config = config or StreamConfig()
    chunk = chunk_features(feature_dim(head_dim, terms), config)
    stored = 2 if config.store_bf16 and operand_dtype(dtype) != torch.float32 else _FP32
    width = padded(value_columns(value_dim, config))
    sums = batch_heads * chunk * (width * stored + _FP32)
    # Coordinates int32, 1/α! fp32, and the temporaries of the unranking: a few int64 and fp32.
    monomials = chunk * (max(1, terms - 1) * 4 + _FP32 + 6 * 8)
    return _results(batch_heads, queries, value_dim) + sums + monomials
