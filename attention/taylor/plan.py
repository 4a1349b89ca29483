"""In which order and in which pieces the features of a call are built.

A monomial of degree p > b is a *lead*, its first p - b sorted coordinates, times a *tail*, the
last b. The *base* features (all degrees up to b) are built once per block of tokens and hold the
tails; leads that end with coordinate j take the tails from j on, a suffix, so that every monomial
occurs exactly once. A piece is such leads times such tails. It is used in one of two ways:

- *scaled*: tails are multiplied with values that were scaled by the leads. Per lead this costs
  Dv + 1 products instead of one per tail, and the features themselves never exist.
- *explicit*: the products are built, several pieces for one matrix product. For pieces with fewer
  tails than values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .features import degree_dim, feature_dim

MAX_BASE = 8448
"""Base features at most: what head_dim 128 needs up to degree 2, and no more."""

MAX_ROWS = 1024
"""Rows of the working matrix at most: explicit features, or leads times values."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Leads that share their last coordinate, times the tails from it on.

    Attributes:
        degree: a, of the leads; 1 or more.
        coordinate: j, the last of each lead.
        start: the first of the leads; they are ``xⱼ`` times monomials of degree a - 1.
        stop: behind the last of them.
        tails: how many tails each lead takes.
    """

    degree: int
    coordinate: int
    start: int
    stop: int
    tails: int

    @property
    def leads(self) -> int:
        return self.stop - self.start

    @property
    def features(self) -> int:
        return self.leads * self.tails


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one matrix product takes: the base (no pieces), explicit pieces, or one scaled piece.

    Attributes:
        pieces: see the module.
        scaled: whether the values are scaled by the leads.
        features: how many in all.
    """

    pieces: tuple[Piece, ...]
    scaled: bool
    features: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All features of degree below P, in pieces.

    Attributes:
        head_dim: d.
        columns: Dv + 1, values and the ones that make the denominator.
        tail: b, the degree of the tails.
        base: features of degree up to b.
        lead_rows: monomials kept for leads: degrees 0 to P - 2 - b; 0 without pieces.
        scale_rows: leads of the largest piece whose leads are products themselves.
        work_rows: rows of the largest explicit or scaled matrix.
        chunks: the base first.
    """

    head_dim: int
    columns: int
    tail: int
    base: int
    lead_rows: int
    scale_rows: int
    work_rows: int
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        """Values per token that a block needs in working memory."""
        return self.base + self.lead_rows + self.scale_rows + self.work_rows + self.columns

    def sum_shape(self, chunk: Chunk) -> tuple[int, int]:
        """Shape of one head's sums over the keys: values, scaled or not, by tails or features."""
        if chunk.scaled:
            (piece,) = chunk.pieces
            return piece.leads * self.columns, piece.tails
        return self.columns, chunk.features


def _lead_counts(head_dim: int, terms: int, tail: int) -> list[tuple[int, int, int, int]]:
    """(degree, coordinate, leads, tails) of every group of leads."""
    return [
        (
            degree,
            coordinate,
            degree_dim(coordinate + 1, degree - 1),
            degree_dim(head_dim - coordinate, tail),
        )
        for degree in range(1, terms - tail)
        for coordinate in range(head_dim)
    ]


def _tail_degree(head_dim: int, columns: int, terms: int) -> int:
    """The b that needs the fewest products per token.

    Where two are equal, the larger one (fewer matrix products) while its base is small.
    """

    def products(tail: int) -> int:
        groups = _lead_counts(head_dim, terms, tail)
        return feature_dim(head_dim, tail + 1) + sum(
            leads * min(tails, columns) for _, _, leads, tails in groups
        )

    allowed = [
        tail
        for tail in range(1, terms)
        if tail == 1 or feature_dim(head_dim, tail + 1) <= MAX_BASE
    ]
    small = max([t for t in allowed if feature_dim(head_dim, t + 1) <= MAX_ROWS], default=1)
    return min(allowed, key=lambda tail: (products(tail), abs(tail - small)), default=0)


def _cut(degree: int, coordinate: int, leads: int, tails: int, most: int) -> list[Piece]:
    """Pieces of at most ``most`` leads."""
    return [
        Piece(degree, coordinate, start, min(start + most, leads), tails)
        for start in range(0, leads, most)
    ]


@lru_cache(maxsize=64)
def make_plan(head_dim: int, value_dim: int, terms: int) -> Plan:
    """The plan for a head dimension d, a value dimension Dv and P terms."""
    columns = value_dim + 1
    tail = _tail_degree(head_dim, columns, terms)
    base = feature_dim(head_dim, tail + 1)
    chunks = [Chunk((), False, base)]
    explicit: list[Piece] = []
    filled = work_rows = 0

    def close() -> None:
        nonlocal explicit, filled, work_rows
        if explicit:
            chunks.append(Chunk(tuple(explicit), False, filled))
            work_rows = max(work_rows, filled)
        explicit, filled = [], 0

    for degree, coordinate, leads, tails in _lead_counts(head_dim, terms, tail):
        if tails > columns:
            most = max(1, MAX_ROWS // columns)
            for piece in _cut(degree, coordinate, leads, tails, most):
                chunks.append(Chunk((piece,), True, piece.features))
                work_rows = max(work_rows, piece.leads * columns)
            continue
        for piece in _cut(degree, coordinate, leads, tails, max(1, MAX_ROWS // tails)):
            if filled + piece.features > MAX_ROWS:
                close()
            explicit.append(piece)
            filled += piece.features
    close()
    lead_rows = feature_dim(head_dim, terms - 1 - tail) if len(chunks) > 1 else 0
    scale_rows = max(
        (piece.leads for chunk in chunks for piece in chunk.pieces if piece.degree > 1), default=0
    )
    return Plan(head_dim, columns, tail, base, lead_rows, scale_rows, work_rows, tuple(chunks))


def stages(plan: Plan, limit: int) -> list[tuple[Chunk, ...]]:
    """Runs of chunks with at most ``limit`` features each, where a chunk isn't larger itself.

    One stage sums over all keys and then serves all queries, so that its sums alone are held.
    """
    done: list[tuple[Chunk, ...]] = []
    current: list[Chunk] = []
    for chunk in plan.chunks:
        if current and sum(c.features for c in current) + chunk.features > limit:
            done.append(tuple(current))
            current = []
        current.append(chunk)
    done.append(tuple(current))
    return done
