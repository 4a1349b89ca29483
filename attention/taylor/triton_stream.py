"""The streaming Triton path of Taylor attention, for feature dimensions too large to hold.

Monomials come in chunks: one launch sums a chunk over all keys, one adds it to all queries, and
the chunk's memory is used again. Its size, not R, bounds the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .features import feature_dim
from .multisets import unrank
from .triton_plan import padded
from .triton_support import (
    check_inputs,
    interpreted,
    kernels,
    operand_dtype,
    rows_contiguous,
)

MAX_TERMS = 8
MAX_VALUE_CHUNK = 128


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """Chunks, tile sizes and launch options of the streaming kernels.

    Attributes:
        feature_chunk: monomials per chunk.
        value_chunk: value channels per chunk; 0 takes up to 128 at once.
        store_bf16: keep a chunk's sums in bf16; otherwise in fp32, multiplied in tf32 where the
            input has 16 bits.
        block_f: monomials per tile.
        block_t: keys per step of the build.
        block_m: queries per program of the read.
        warps: warps per program.
        stages: software-pipelining depth.
    """

    feature_chunk: int = 8192
    value_chunk: int = 0
    store_bf16: bool = False
    block_f: int = 64
    block_t: int = 32
    block_m: int = 64
    warps: int = 8
    stages: int = 2


def refusal(terms: int) -> str:
    """Why the streaming path can't take this number of terms; empty where it can."""
    if not 1 <= terms <= MAX_TERMS:
        return f"P {terms} is above {MAX_TERMS}, the most that the streaming path expands"
    return ""


def chunk_features(features: int, config: StreamConfig) -> int:
    """Monomials of one chunk: the wished number, no more than needed, in whole tiles."""
    return math.ceil(min(config.feature_chunk, features) / config.block_f) * config.block_f


def value_columns(value_dim: int, config: StreamConfig) -> int:
    """Value channels of one chunk."""
    return min(config.value_chunk or value_dim, value_dim, MAX_VALUE_CHUNK)


def sums(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: int,
    *,
    weights: torch.Tensor | None = None,
    config: StreamConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of attention with exp cut below degree ``terms``.

    Arguments, results and errors as in `triton_full.sums`, for P from 1 to 8. The order of
    every sum is fixed: equal inputs give equal bits.
    """
    check_inputs(query, key, value, weights)
    reason = refusal(terms)
    if reason:
        raise ValueError(f"streaming path: {reason}")
    config = config or StreamConfig()
    query, key, value = rows_contiguous(query), rows_contiguous(key), rows_contiguous(value)
    if weights is not None:
        weights = weights.expand(key.shape[:3])
    with torch.cuda.device(query.device if query.is_cuda and not interpreted() else -1):
        return _stream(query, key, value, terms, weights, config)


def _stream(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: int,
    weights: torch.Tensor | None,
    config: StreamConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, head_dim = query.shape
    value_dim, bh = value.shape[3], batch * heads
    # P = 1 has the constant monomial alone, which P = 2 lists last.
    degree = max(1, terms - 1)
    features = feature_dim(head_dim, terms)
    first = feature_dim(head_dim, 2) - 1 if terms == 1 else 0
    chunk = chunk_features(features, config)
    columns = value_columns(value_dim, config)
    width = padded(columns)
    operand = operand_dtype(query.dtype)
    stored = operand if config.store_bf16 or operand == torch.float32 else torch.float32
    module = kernels("triton_stream_kernels")
    tl = module.tl
    numerator = query.new_zeros(batch, heads, queries, value_dim, dtype=torch.float32)
    denominator = query.new_zeros(batch, heads, queries, 1, dtype=torch.float32)
    s = query.new_empty(bh, chunk, width, dtype=stored)
    z = query.new_empty(bh, chunk, dtype=torch.float32)
    for start in range(0, features, chunk):
        coordinates, factors = unrank(first + start, chunk, head_dim, degree + 1, query.device)
        live = math.ceil(min(chunk, features - start) / config.block_f) * config.block_f
        for column in range(0, value_dim, columns):
            part = value[..., column : column + columns]
            module.build_chunk_kernel[(live // config.block_f, bh)](
                key,
                part,
                weights if weights is not None else key,
                coordinates,
                factors,
                s,
                z,
                heads,
                key.shape[2],
                head_dim,
                part.shape[3],
                *key.stride()[:3],
                *part.stride()[:3],
                *(weights.stride() if weights is not None else (0, 0, 0)),
                FEATURES=chunk,
                DEGREE=degree,
                DV=width,
                BF=config.block_f,
                BT=config.block_t,
                WEIGHTED=weights is not None,
                MASS=column == 0,
                OPERAND=tl.float32 if operand == torch.float32 else tl.bfloat16,
                num_warps=config.warps,
                num_stages=config.stages,
            )
            module.read_chunk_kernel[(math.ceil(queries / config.block_m), bh)](
                query,
                coordinates,
                s,
                z,
                numerator[..., column:],
                denominator,
                heads,
                queries,
                head_dim,
                part.shape[3],
                value_dim,
                live,
                *query.stride()[:3],
                FEATURES=chunk,
                DEGREE=degree,
                DV=width,
                BF=config.block_f,
                BM=config.block_m,
                MASS=column == 0,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
                num_warps=config.warps,
                num_stages=config.stages,
            )
    return numerator, denominator
