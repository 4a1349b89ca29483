"""How the fully fused Triton path lays out the monomials of a truncated exponential.

Monomials of the highest degree P - 1 are ``base feature × coordinate``: the base features are
the monomials of degree P - 2 in lexicographic order, cut into chunks, and each chunk is
*lifted* by coordinates 0, 1, …, up to the largest one that still leaves the product sorted.
With base features B, values V and queries q the highest degree contributes

``Σ_chunks Σ_i q_i · (B(q)_chunk @ S[chunk, i])``, ``S[chunk, i] = B(k)_chunkᵀ (k_i · V) / α!``

so a feature of the highest degree is never formed and nothing is gathered: a product with a
coordinate is an fp32 factor on the accumulator (the quadratic-form loop, one degree higher),
or on the base features where values are wider than a chunk of them. Pairs of coordinates are
formed by two products with 0/1 selection matrices, which are exact, in the build, and gathered
in the read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

MAX_TERMS = 4
MAX_HEAD_DIM = {1: 256, 2: 256, 3: 128, 4: 64}
"""Largest head dimension per number of terms that the fully fused path takes."""
MAX_VALUE_DIM = 128


@dataclass(frozen=True, slots=True)
class FullConfig:
    """Tile sizes and launch options of the fully fused kernels.

    Attributes:
        chunk: base features per tile.
        lifts: coordinates by which the read lifts one tile of base features at a time.
        build_lifts: the same of the build, a multiple of ``lifts``; more mean fewer passes over
            the keys.
        block_t: keys per step of the build.
        block_m: queries per program of the read.
        build_warps: warps per program of the build.
        read_warps: warps per program of the read.
        build_stages: software-pipelining depth of the build.
        read_stages: software-pipelining depth of the read.
    """

    chunk: int = 32
    lifts: int = 4
    build_lifts: int = 8
    block_t: int = 64
    block_m: int = 128
    build_warps: int = 8
    read_warps: int = 8
    build_stages: int = 3
    read_stages: int = 3


_MIN_KEYS_PER_SPLIT = 512
_PROGRAMS_PER_PROCESSOR = 8
"""Enough that the loads of one hide behind the products of others."""


def split_count(programs: int, tokens: int, processors: int) -> int:
    """Splits over keys that give each multiprocessor a few programs, none of them tiny."""
    wanted = math.ceil(_PROGRAMS_PER_PROCESSOR * processors / programs)
    return max(1, min(wanted, tokens // _MIN_KEYS_PER_SPLIT))


def padded(size: int) -> int:
    """The next power of two, at least 16: what a tile of that many columns occupies."""
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Division:
    """Where the read leaves finished attention in place of sums.

    Attributes:
        out: ``[B, H, Nq, D]``, written in its own dtype and strides; D holds the slices of a head
            side by side.
        value_mean: ``[BH · parts, Dv]`` fp32, added after the division.
        parts: slices of a head.
        eps: least denominator by which is divided, relative to the sum of the weights.
        round_denominators: to the dtype of ``out``, before they are tested and divided by.
    """

    out: torch.Tensor
    value_mean: torch.Tensor
    parts: int
    eps: float
    round_denominators: bool


def check_config(
    config: FullConfig, head_dim: int, value_dim: int, terms: int, dtype: torch.dtype
) -> None:
    """Refuse tile sizes that don't fit each other or that compile to wrong code.

    Args:
        config: tile sizes.
        head_dim: d.
        value_dim: Dv.
        terms: P.
        dtype: of the operands of matrix products.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if config.build_lifts % config.lifts:
        raise ValueError(
            f"build_lifts: {config.build_lifts} is not allowed; "
            f"allowed: multiples of lifts, {config.lifts}"
        )
    if (
        dtype != torch.float32
        and config.lifts >= 8
        and min(config.chunk, config.read_warps * 8) >= 64
    ):
        # Seen with Triton 3.6 on an H200: the read gives wrong numbers.
        raise ValueError(
            f"lifts: {config.lifts} is not allowed with chunk {config.chunk} and read_warps "
            f"{config.read_warps}; allowed: up to 4, or chunk up to 32, or read_warps up to 4"
        )
    most = min(padded(head_dim), padded(value_dim), 64)
    if terms >= 4 and dtype != torch.float32 and config.chunk > most:
        # Seen with Triton 3.6 on an H100: a 16-bit product of [., 64] and [64, 32] takes wrong
        # rows of its second operand, up to addresses that don't exist.
        raise ValueError(
            f"chunk: {config.chunk} is not allowed at head_dim {head_dim}, value_dim {value_dim} "
            f"and P {terms}; allowed: up to {most}"
        )


def default_config(head_dim: int, value_dim: int, terms: int, dtype: torch.dtype) -> FullConfig:
    """Tile sizes that are known to compile without spills for these shapes."""
    wide = padded(value_dim)
    narrow = min(wide, padded(head_dim))
    if dtype == torch.float32:
        # Products run outside the tensor cores, from registers.
        large = max(wide, padded(head_dim)) > 64
        return FullConfig(
            chunk=16 if head_dim <= 16 else 32,
            lifts=1,
            build_lifts=1,
            block_t=32,
            block_m=32 if large else 64,
            build_warps=4,
            read_warps=8,
            build_stages=1,
            read_stages=1,
        )
    chunk = min(64 if terms >= 4 else 32, narrow)
    lifts = max(1, 128 // wide)
    return FullConfig(
        chunk=chunk,
        lifts=lifts,
        # A tile of the build holds 128 lifted features where values are wider than a chunk.
        build_lifts=max(2 * lifts, 128 // chunk) if wide > 64 else 2 * lifts,
        block_m=64,
        # Pairs of coordinates and wide tiles together need more registers.
        build_warps=8 if terms >= 4 and wide > 32 else 4,
        build_stages=2 if terms >= 4 and wide > 32 else 3,
        read_warps=4,
    )


def refusal(head_dim: int, value_dim: int, terms: int) -> str:
    """Why the fully fused path can't take these shapes; empty where it can."""
    if not 1 <= terms <= MAX_TERMS:
        return f"P {terms} is above {MAX_TERMS}, the most that the fully fused path expands"
    if head_dim > MAX_HEAD_DIM[terms]:
        return (
            f"head_dim {head_dim} is above {MAX_HEAD_DIM[terms]}, "
            f"the most of the fully fused path at P {terms}"
        )
    if value_dim > MAX_VALUE_DIM:
        return f"value_dim {value_dim} is above {MAX_VALUE_DIM}"
    return ""


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """Base features of one degree, in chunks, and how they are weighted.

    Attributes:
        coordinates: ``[chunks, chunk, degree]`` int64, the sorted coordinates of each feature;
            -1 where the chunk is padded.
        value_weights: ``[chunks, 1, chunk]`` fp32: 1/α! of each feature, 0 where padded.
        gradient_weights: ``[chunks, 1, chunk]`` fp32: the feature's factor in
            ``Σ_i q_i (B(q) @ Z)_i``, with Z over all coordinates i, which counts every monomial
            of the next degree once for each order of its coordinates.
    """

    coordinates: torch.Tensor
    value_weights: torch.Tensor
    gradient_weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class LiftLayout:
    """Tiles of the highest degree: a chunk of base features × ``lifts`` coordinates.

    Attributes:
        tile_chunk: ``[T]`` int32, the chunk of each tile.
        tile_lift: ``[T]`` int32, the first coordinate of each tile.
        first: ``[chunks]`` int32, the first tile of each chunk, in tiles of the read.
        count: ``[chunks]`` int32, the number of the read's tiles of each chunk.
        weights: ``[T, lifts, chunk]`` fp32: 1/α! of coordinate × feature where the product is
            sorted, 0 elsewhere, so that every monomial counts once.
    """

    tile_chunk: torch.Tensor
    tile_lift: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    weights: torch.Tensor


def _base_features(head_dim: int, degree: int) -> list[tuple[int, ...]]:
    if degree == 1:
        return [(a,) for a in range(head_dim)]
    return [(a, b) for a in range(head_dim) for b in range(a, head_dim)]


def _inverse_factorial(multiset: tuple[int, ...]) -> float:
    counts = {c: multiset.count(c) for c in multiset}
    return 1.0 / math.prod(math.factorial(n) for n in counts.values())


@lru_cache(maxsize=32)
def base_layout(head_dim: int, degree: int, chunk: int) -> BaseLayout:
    """Chunks of the monomials of ``degree`` (1 or 2), on the CPU."""
    features = _base_features(head_dim, degree)
    chunks = math.ceil(len(features) / chunk)
    with torch.inference_mode(False):
        coordinates = torch.full((chunks * chunk, degree), -1, dtype=torch.int64)
        coordinates[: len(features)] = torch.tensor(features, dtype=torch.int64)
        value = torch.zeros(chunks * chunk)
        value[: len(features)] = torch.tensor([_inverse_factorial(f) for f in features])
        # Orders of a feature's coordinates, over those of a monomial of the next degree.
        gradient = value * math.factorial(degree) / math.factorial(degree + 1)
        return BaseLayout(
            coordinates.view(chunks, chunk, degree),
            value.view(chunks, 1, chunk),
            gradient.view(chunks, 1, chunk),
        )


@lru_cache(maxsize=32)
def lift_layout(head_dim: int, degree: int, chunk: int, lifts: int, read_lifts: int) -> LiftLayout:
    """Tiles of the monomials of ``degree + 1`` over base features of ``degree``, on the CPU.

    A tile of ``lifts`` coordinates is ``lifts / read_lifts`` tiles to the read.
    """
    coordinates = base_layout(head_dim, degree, chunk).coordinates
    tile_chunk: list[int] = []
    tile_lift: list[int] = []
    first: list[int] = []
    count: list[int] = []
    weights: list[list[list[float]]] = []
    for index, features in enumerate(coordinates.tolist()):
        # A feature is lifted by coordinates up to its own smallest one.
        highest = max(feature[0] for feature in features) + 1
        tiles = math.ceil(highest / lifts)
        first.append(len(tile_chunk) * (lifts // read_lifts))
        count.append(math.ceil(highest / read_lifts))
        for tile in range(tiles):
            tile_chunk.append(index)
            tile_lift.append(tile * lifts)
            weights.append(
                [
                    [
                        _inverse_factorial((i, *feature)) if i <= feature[0] else 0.0
                        for feature in features
                    ]
                    for i in range(tile * lifts, (tile + 1) * lifts)
                ]
            )
    with torch.inference_mode(False):
        return LiftLayout(
            torch.tensor(tile_chunk, dtype=torch.int32),
            torch.tensor(tile_lift, dtype=torch.int32),
            torch.tensor(first, dtype=torch.int32),
            torch.tensor(count, dtype=torch.int32),
            torch.tensor(weights, dtype=torch.float32),
        )


@lru_cache(maxsize=32)
def selection(head_dim: int, chunk: int) -> torch.Tensor:
    """0/1 matrices that pick both coordinates of each pair.

    Returns:
        ``[2, chunks, padded(head_dim), chunk]`` fp32 on the CPU: ``x @ result[0, c]`` is the
        first coordinate of each pair in chunk c, ``x @ result[1, c]`` the second.
    """
    coordinates = base_layout(head_dim, 2, chunk).coordinates
    with torch.inference_mode(False):
        picks = torch.zeros(2, coordinates.shape[0], padded(head_dim), chunk)
        for side in range(2):
            for index, features in enumerate(coordinates.tolist()):
                for column, feature in enumerate(features):
                    if feature[side] >= 0:
                        picks[side, index, feature[side], column] = 1.0
        return picks


@lru_cache(maxsize=32)
def pair_coordinates(head_dim: int, chunk: int) -> torch.Tensor:
    """Both coordinates of each pair: ``[2, chunks * chunk]`` int32 on the CPU, 0 where padded."""
    coordinates = base_layout(head_dim, 2, chunk).coordinates
    with torch.inference_mode(False):
        return coordinates.clamp_min(0).view(-1, 2).T.contiguous().to(torch.int32)


def lifted_rows(head_dim: int, terms: int, config: FullConfig) -> int:
    """Rows of the highest degree that are stored and multiplied, padding included."""
    if terms < 3:
        return 0
    layout = lift_layout(head_dim, terms - 2, config.chunk, config.build_lifts, config.lifts)
    return layout.tile_chunk.numel() * config.build_lifts * config.chunk
