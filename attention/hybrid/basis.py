"""The coordinates that the global part keeps: fitted once per layer and run, and remembered."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ..quality import sampled_indices
from ..taylor import kernel
from ..taylor.projection import factors_of, regularised
from .means import Means

log = logging.getLogger("attnscope")


@dataclass(frozen=True, slots=True)
class Key:
    """What a fit holds for. Anything else needs a fit of its own.

    Attributes:
        layer: name of the block.
        heads: H.
        head_dim: D.
        rank: r.
        dtype: of the fitted matrices.
        device: they lie on.
    """

    layer: str
    heads: int
    head_dim: int
    rank: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Basis:
    """Matrices with ``(q A)·(k B) ≈ q·k``.

    Attributes:
        of_query: A, ``[1, H, D, r]``.
        of_key: B, ``[1, H, D, r]``.
        fitted: False where it only keeps the first coordinates.
    """

    of_query: torch.Tensor
    of_key: torch.Tensor
    fitted: bool


def identity(key: Key) -> Basis:
    """Keeps the first coordinates."""
    eye = torch.eye(key.head_dim, key.rank, dtype=key.dtype, device=key.device)
    eye = eye.expand(1, key.heads, -1, -1)
    return Basis(eye, eye, fitted=False)


def fit(key: Key, query: torch.Tensor, keys: torch.Tensor, mean: Means, samples: int) -> Basis:
    """The least expected error of q·k at the rank, over all pictures of the batch.

    Args:
        key: shapes and dtype.
        query: ``[B, H, N, D]``, any floating dtype.
        keys: ``[B, H, N, D]``.
        mean: that is taken out of both.
        samples: tokens of each picture that are looked at; 0 for all.

    Returns:
        `identity` where there are fewer samples than coordinates to find.
    """
    tokens = query.shape[2]
    count = min(samples, tokens) if samples else tokens
    if count * query.shape[0] < max(2, key.rank):
        return identity(key)
    rows = sampled_indices(tokens, count, 0, query.device) if count < tokens else None
    a, b = factors_of(
        regularised(_moment(query, mean.query, rows)),
        regularised(_moment(keys, mean.key, rows)),
        key.rank,
    )
    return Basis(a.to(key.dtype), b.to(key.dtype), fitted=True)


def rows_at_a_time(heads: int, width: int, size: int, device: torch.device) -> int:
    """Tokens whose copies `fit` holds at a time.

    Args:
        heads: H.
        width: D.
        size: bytes of a number.
        device: where.
    """
    return max(16, kernel.budget(device).block // (3 * heads * width * size))


def _moment(x: torch.Tensor, mean: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Σ (x - mean)·(x - mean)ᵀ over pictures and rows, ``[1, H, D, D]``; all rows for None."""
    heads, tokens, width = x.shape[1:]
    total = mean.new_zeros(heads, width, width)
    step = rows_at_a_time(heads, width, mean.element_size(), x.device)
    count = tokens if rows is None else len(rows)
    for picture, middle in zip(x, mean):  # noqa: B905
        for first in range(0, count, step):
            if rows is None:
                some = picture[:, first : first + step]
            else:
                some = picture.index_select(1, rows[first : first + step])
            some = some.to(mean.dtype) - middle
            total.baddbmm_(some.transpose(-2, -1), some)
    return total.unsqueeze(0)


class Bases:
    """The fits of one run."""

    def __init__(self) -> None:
        self._known: dict[Key, Basis] = {}
        self._said = False

    def find(
        self,
        key: Key,
        query: torch.Tensor,
        keys: torch.Tensor,
        mean: Means,
        samples: int,
        *,
        named: bool,
    ) -> Basis:
        """The fit for a key, made at its first call.

        Args:
            key: what it holds for.
            query: see `fit`; looked at only where there is no fit yet.
            keys: likewise.
            mean: likewise.
            samples: see `fit`.
            named: whether the layer is known. Calls of unknown layers share no fit.
        """
        basis = self._known.get(key) if named else None
        if basis is not None:
            return basis
        basis = fit(key, query, keys, mean, samples)
        if not basis.fitted and not self._said:
            self._said = True
            log.info(
                "AttnScope: too few tokens to choose %d coordinates by; the first ones are kept",
                key.rank,
            )
        if basis.fitted and named:
            # Too few samples say nothing about calls that have more.
            self._known[key] = basis
        return basis
