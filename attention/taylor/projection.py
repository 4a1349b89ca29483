"""Low-rank query and key per head, so that the expansion has fewer coordinates.

Of all rank-r forms the expected ``(q·k - qᵀXk)²`` over independent queries and keys is least for
``X = Cq^-½ U Uᵀ Cq^½``, U the first r eigenvectors of ``Cq^½ Ck Cq^½``, with ``Cq``, ``Ck`` the
second moments (Eckart and Young on ``Cq^½ Ck^½``). With Y any basis of the invariant subspace of
``Cq Ck`` that ``Cq^½ U`` spans,

``X = Ck Y (Yᵀ Ck Y)⁻¹ Yᵀ``,

which takes no square roots of moments. Y comes from subspace iteration: matrix products and
Cholesky factors, none of which makes a GPU's host wait, as an eigendecomposition does.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..quality import sampled_indices

SAMPLES = 2048
"""Tokens whose second moments are taken."""

ITERATIONS = 12
"""Of the subspace iteration."""


@lru_cache(maxsize=16)
def start(head_dim: int, rank: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Where the iteration starts: fixed, and with a share in every direction."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        basis = torch.randn(head_dim, rank, generator=generator, dtype=torch.float64)
        return basis.to(device, dtype)


def second_moment(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Weighted mean of ``x xᵀ`` over tokens spread over the sequence.

    Args:
        x: ``[B, H, N, D]``, finite.
        weights: ``[B, H, N]``, not negative; None for 1.

    Returns:
        ``[B, H, D, D]``, regularised in proportion to its trace.
    """
    if x.shape[2] > SAMPLES:
        rows = sampled_indices(x.shape[2], SAMPLES, 0, x.device)
        x = x.index_select(2, rows)
        weights = None if weights is None else weights.index_select(2, rows)
    left = x if weights is None else x * weights[:, :, :, None]
    return regularised(torch.matmul(left.transpose(-2, -1), x))


def regularised(moment: torch.Tensor) -> torch.Tensor:
    """Second moments ``[..., D, D]`` of trace 1 and a little more, whatever their scale was."""
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    tiny = torch.finfo(moment.dtype).tiny
    moment = moment / trace.clamp_min(tiny)
    # Keeps the Cholesky factors finite where a head has fewer directions than coordinates.
    eye = torch.eye(moment.shape[-1], device=moment.device, dtype=moment.dtype)
    return moment + eye * (torch.finfo(moment.dtype).eps * 10.0)


def _cholesky(gram: torch.Tensor) -> torch.Tensor:
    """Lower factor of positive semidefinite matrices, without a check that would wait."""
    size = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, device=gram.device, dtype=gram.dtype)
    jitter = scale * (torch.finfo(gram.dtype).eps * size) * eye
    lower: torch.Tensor = torch.linalg.cholesky_ex(gram + jitter, check_errors=False)[0]
    return lower


def _orthonormal(basis: torch.Tensor) -> torch.Tensor:
    """Columns made nearly orthonormal: two rounds of ``Y ← Y L⁻ᵀ`` with ``L Lᵀ = YᵀY``."""
    for _ in range(2):
        basis = basis / basis.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(basis.dtype).tiny)
        lower = _cholesky(torch.matmul(basis.transpose(-2, -1), basis))
        basis = torch.linalg.solve_triangular(
            lower.transpose(-2, -1), basis, upper=True, left=False
        )
    return basis


def factors(
    query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices A, B with ``(qᵀA)·(kᵀB) ≈ q·k``, the best of their rank.

    Args:
        query: ``[B, H, Nq, D]``, float32 or float64, centred if it is going to be.
        key: ``[B, H, Nk, D]``, likewise.
        weights: of the keys, ``[B, H, Nk]``; None for 1.
        rank: r, from 1 to D.

    Returns:
        A and B, ``[B, H, D, r]`` each, scaled so that both sides have like norms.

    Raises:
        ValueError: ``rank`` is out of its range.
    """
    head_dim = query.shape[-1]
    if not 1 <= rank <= head_dim:
        raise ValueError(f"feature_projection: {rank} is not allowed; allowed: 1 to {head_dim}")
    return factors_of(second_moment(query, None), second_moment(key, weights), rank)


def factors_of(
    of_query: torch.Tensor, of_key: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`factors` of second moments ``[B, H, D, D]``, both of them `regularised`."""
    basis = start(of_query.shape[-1], rank, of_query.device, of_query.dtype)
    basis = basis.expand(*of_query.shape[:2], -1, -1)
    for _ in range(ITERATIONS):
        basis = _orthonormal(torch.matmul(of_query, torch.matmul(of_key, basis)))
    left = torch.matmul(of_key, basis)
    # X = A Bᵀ for A = Ck Y L⁻ᵀ, B = Y L⁻ᵀ, L Lᵀ = Yᵀ Ck Y: keys become white.
    lower = _cholesky(torch.matmul(basis.transpose(-2, -1), left))
    upper = lower.transpose(-2, -1)
    a, b = (
        torch.linalg.solve_triangular(upper, side, upper=True, left=False)
        for side in (left, basis)
    )
    # Split the scale between the sides, so that the monomials of neither overflow.
    spread = (a * torch.matmul(of_query, a)).sum(dim=(-2, -1), keepdim=True)
    balance = (spread / (b * torch.matmul(of_key, b)).sum(dim=(-2, -1), keepdim=True)) ** 0.25
    return a / balance, b * balance
