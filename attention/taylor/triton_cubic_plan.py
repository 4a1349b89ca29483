"""How the cubic kernels (P = 4 in 16 bits) lay out monomials up to degree 3.

Coordinates come in blocks of 8. Every monomial of degree 1 to 3 is ``feature × coordinate``,
where the coordinates of one block lift features of at most degree 2. Which features a block lifts
is chosen so that few products are formed twice: all pairs within a block, the pairs across two
blocks of those triples of blocks that it takes, all coordinates and 1. For 32 coordinates that is
241 features a block, 7,712 products for 6,544 monomials, where pairs in lexicographic order take
9,216 in tiles of the same size.

A feature is the product of two factors, each a coordinate or 1, which products with 0/1 matrices
pick out exactly, on the tensor cores: in the layout in which the next product takes them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch

from .triton_plan import padded

BLOCK = 8
MASS_COLUMNS = 16
"""Columns of the products for the denominator, one for each coordinate of a block; padded."""
_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class CubicConfig:
    """Tile sizes and launch options of the cubic kernels.

    Attributes:
        chunk: features per tile, at most.
        block_t: keys per step of the build.
        block_m: queries per program of the read.
        columns: of one product of the read; ``lifts · padded value_dim`` at most.
        build_warps: warps per program of the build.
        read_warps: warps per program of the read.
        build_stages: software-pipelining depth of the build.
        read_stages: software-pipelining depth of the read.
    """

    chunk: int = 128
    block_t: int = 64
    block_m: int = 128
    columns: int = 256
    build_warps: int = 8
    read_warps: int = 8
    build_stages: int = 3
    read_stages: int = 2


_LARGE_BYTES, _SMALL_BYTES = 190_000, 98_304
"""Shared memory that the larger and the smaller tiles take, at up to 32 coordinates."""


def cubic_config(head_dim: int, shared_memory: int) -> CubicConfig | None:
    """Tile sizes that fit a GPU's shared memory, in bytes per program; None where none do."""
    # Tables of what is chosen grow with the coordinates.
    room = shared_memory if head_dim <= 32 else shared_memory // 2
    if room >= _LARGE_BYTES:
        return CubicConfig()
    if room >= _SMALL_BYTES:
        return CubicConfig(
            chunk=64, block_t=32, block_m=64, columns=128, build_warps=4, read_warps=4
        )
    return None


def check_cubic(config: CubicConfig) -> None:
    """Refuse options that compile to wrong code.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if config.read_stages < 2:
        # Seen with Triton 3.6 on an H200: addresses that don't exist.
        raise ValueError(
            f"read_stages: {config.read_stages} is not allowed for P 4 in 16 bits; "
            "allowed: 2 or more"
        )


def lifts(value_dim: int) -> int:
    """Coordinates by which one tile lifts: 256 columns of values where a block has them."""
    return min(BLOCK, max(1, _COLUMNS // padded(value_dim)))


@dataclass(frozen=True, slots=True)
class CubicLayout:
    """Tiles, ordered by the coordinates that lift, then by chunks of features.

    Attributes:
        chunks: of features of one block; tile t is chunk ``t % chunks`` of its coordinates.
        common: chunks that are the same for all blocks, the first ones; those hold pairs only.
        lifts: coordinates of a tile, the first of which is ``t // chunks * lifts``.
        chosen: ``[blocks * chunks, 2, chunk, padded(head_dim)]`` fp32, 0 or 1: ``chosen @ x`` is
            each feature's first and second factor, where it is a coordinate.
        ones: ``[blocks * chunks, 2, chunk]`` fp32: 1 where it is 1.
        weights: ``[tiles, chunk, lifts]`` fp32: 1/α! of feature × coordinate, 0 where another
            tile holds the monomial or where padded.
    """

    chunks: int
    common: int
    lifts: int
    chosen: torch.Tensor
    ones: torch.Tensor
    weights: torch.Tensor


def _blocks(head_dim: int) -> list[range]:
    return [range(start, min(start + BLOCK, head_dim)) for start in range(0, head_dim, BLOCK)]


def pairs_within(head_dim: int) -> int:
    """Pairs within a block, of all blocks: the features that every block lifts first."""
    return sum(math.comb(len(block) + 1, 2) for block in _blocks(head_dim))


def features(head_dim: int) -> list[list[tuple[int, ...]]]:
    """Sorted coordinates of the features that each block of coordinates lifts."""
    blocks = _blocks(head_dim)
    across: list[list[tuple[int, ...]]] = [[] for _ in blocks]
    for triple in itertools.combinations(range(len(blocks)), 3):
        # Any of the three can lift the pairs of the others: the one with the fewest so far.
        lifting = min(triple, key=lambda block: (len(across[block]), block))
        one, other = (blocks[block] for block in triple if block != lifting)
        across[lifting] += itertools.product(one, other)
    within = [
        pair for block in blocks for pair in itertools.combinations_with_replacement(block, 2)
    ]
    singles = [(coordinate,) for coordinate in range(head_dim)]
    return [[*within, *pairs, *singles, ()] for pairs in across]


def chunk_size(head_dim: int, most: int) -> int:
    """Features of a tile: what one block lifts where that is less than ``most``."""
    return min(most, max(64, padded(len(features(head_dim)[0]))))


@lru_cache(maxsize=16)
def cubic_layout(head_dim: int, value_dim: int, most: int) -> CubicLayout:
    """The layout, on the CPU, with chunks of at most ``most`` features."""
    listed = features(head_dim)
    chunk, lifted = chunk_size(head_dim, most), lifts(value_dim)
    chunks = math.ceil(max(map(len, listed)) / chunk)
    with torch.inference_mode(False):
        chosen = torch.zeros(len(listed), chunks * chunk, 2, padded(head_dim))
        ones = torch.zeros(len(listed), chunks * chunk, 2)
        weights = torch.zeros(len(listed), chunks * chunk, BLOCK)
        seen: set[tuple[int, ...]] = set()
        for block, found in enumerate(listed):
            for row, feature in enumerate(found):
                for factor in range(2):
                    if factor < len(feature):
                        chosen[block, row, factor, feature[factor]] = 1.0
                    else:
                        ones[block, row, factor] = 1.0
                for lift in range(min(BLOCK, head_dim - block * BLOCK)):
                    monomial = tuple(sorted((*feature, block * BLOCK + lift)))
                    if monomial not in seen:
                        seen.add(monomial)
                        counts = Counter(monomial).values()
                        weights[block, row, lift] = 1 / math.prod(map(math.factorial, counts))
        tables = len(listed) * chunks
        weights = weights.view(len(listed), chunks, chunk, BLOCK // lifted, lifted)
        return CubicLayout(
            chunks,
            pairs_within(head_dim) // chunk,
            lifted,
            chosen.view(tables, chunk, 2, -1).transpose(1, 2).contiguous(),
            ones.view(tables, chunk, 2).transpose(1, 2).contiguous(),
            weights.permute(0, 3, 1, 2, 4).reshape(-1, chunk, lifted).contiguous(),
        )
