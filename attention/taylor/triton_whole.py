"""Taylor attention of whole heads in Triton: prepared, summed and divided in few passes.

The same numbers as `attend` with the fully fused sums: scale, split, centring, projection, sums,
division. There they are dozens of passes of torch over fp32 copies, which take longer than the
sums; here query, key and value are read twice, once for their means and once to be laid out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .triton_cubic_plan import CubicConfig
from .triton_full import build, chosen_config, read
from .triton_plan import Division, FullConfig, check_config, padded
from .triton_project import MAX_RANK, MAX_WIDTH, factors, precision
from .triton_support import (
    interpreted,
    kernels,
    operand_dtype,
    rows_contiguous,
    shared_memory,
)

_BLOCK_T = 64


def whole_bytes(
    queries: int, keys: int, head_dim: int, value_dim: int, parts: int, rank: int, size: int
) -> int:
    """Bytes of what is prepared of one head, operands of ``size``; ``rank`` 0: not projected.

    Moments and the sums of roundings are less than the partial sums that come when they are gone.
    """
    width = rank * parts or head_dim
    return ((queries + keys) * width + keys * value_dim) * size + keys * parts * 4


def takes(head_dim: int, parts: int, rank: int) -> bool:
    """Whether slices of these heads can be prepared here."""
    return rank == 0 or (head_dim // parts <= MAX_WIDTH and rank <= MAX_RANK)


def _means(x: torch.Tensor) -> torch.Tensor:
    """``[BH, D]`` fp32, contiguous."""
    return x.mean(dim=2, dtype=torch.float32).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class _Laid:
    """Slices ``[B, H · parts, N, width]`` in the operands' dtype, and what came with them.

    Attributes:
        rows: centred, scaled, projected.
        exponents: ``[B, H · parts, N]`` fp32, their products with the other side's mean.
        lost: ``[B · H · parts, width]`` fp32, the mean of what rounding took away.
    """

    rows: torch.Tensor
    exponents: torch.Tensor | None
    lost: torch.Tensor | None


def _lay(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    root: float,
    parts: int,
    *,
    other_mean: torch.Tensor | None = None,
    other_root: float = 1.0,
    matrix: torch.Tensor | None = None,
    errors: bool = False,
) -> _Laid:
    batch, heads, tokens, head_dim = x.shape
    width = head_dim // parts
    columns = matrix.shape[2] if matrix is not None else width
    out = x.new_empty(batch, heads * parts, tokens, columns, dtype=operand_dtype(x.dtype))
    blocks, slices = math.ceil(tokens / _BLOCK_T), batch * heads * parts
    exponents = lost = None
    if other_mean is not None:
        exponents = x.new_empty(batch, heads * parts, tokens, dtype=torch.float32)
    if errors:
        lost = x.new_empty(blocks, slices, width, dtype=torch.float32)
    kernels("triton_prepare_kernels").lay_kernel[(blocks, slices)](
        x,
        mean if mean is not None else x,
        other_mean if other_mean is not None else x,
        out,
        exponents if exponents is not None else x,
        lost if lost is not None else x,
        matrix if matrix is not None else x,
        heads,
        tokens,
        width,
        columns,
        root,
        other_root,
        *x.stride()[:3],
        PARTS=parts,
        W=padded(width),
        R=padded(columns),
        BT=_BLOCK_T,
        CENTRE=mean is not None,
        EXPONENTS=exponents is not None,
        ERRORS=lost is not None,
        PROJECT=matrix is not None,
        PRECISION=precision(x.dtype),
        num_warps=4,
    )
    return _Laid(out, exponents, lost.sum(0).div_(tokens) if lost is not None else None)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    terms: int,
    *,
    parts: int,
    rank: int,
    centre_queries: bool,
    centre_keys: bool,
    centre_values: bool,
    round_denominators: bool,
    eps: float,
    out: torch.Tensor,
    config: FullConfig | CubicConfig | None = None,
) -> torch.Tensor:
    """Attention with exp cut below degree ``terms``, of independent slices of heads.

    Values are centred about their plain mean. `centring` takes the weighted one; which constant
    is taken out and added again does not change the quotient, only its rounding.

    Args:
        query: ``[B, H, Nq, D]``; fp32, fp16 or bf16.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, Dv]``.
        scale: factor on q·k of a whole head; may be negative.
        terms: P, 2 to 4.
        parts: slices of a head, each an attention of its own; divides D and Dv.
        rank: of the projection of each slice, see `projection`; 0 for none.
        centre_queries: see `centring.centre`.
        centre_keys: likewise.
        centre_values: likewise.
        round_denominators: see `attend.Options`.
        eps: least denominator by which is divided, relative to the sum of the key weights.
        out: ``[B, H, Nq, Dv]``, overwritten; its last dimension contiguous.
        config: tile sizes; None chooses them from the shapes.

    Returns:
        Denominators over the sum of the key weights, ``[B, H · parts, Nq, 1]`` fp32.
    """
    batch, heads, _, head_dim = query.shape
    value_dim = value.shape[3] // parts
    width = rank or head_dim // parts
    config = config or chosen_config(
        width, value_dim, terms, query.dtype, shared_memory(query.device)
    )
    if isinstance(config, FullConfig):
        check_config(config, width, value_dim, terms, operand_dtype(query.dtype))
    root = (abs(scale) * parts**0.5) ** 0.5
    query_root = root if scale >= 0 else -root
    with torch.cuda.device(query.device if query.is_cuda and not interpreted() else -1):
        query, key, value = (rows_contiguous(x) for x in (query, key, value))
        query_mean = _means(query) if centre_queries else None
        key_mean = _means(key) if centre_keys else None
        value_mean = _means(value) if centre_values else None
        of_query = of_key = None
        if rank:
            of_query, of_key = factors(
                query,
                key,
                rank,
                query_mean=query_mean,
                key_mean=key_mean,
                query_root=query_root,
                key_root=root,
                parts=parts,
            )
        q = _lay(query, query_mean, query_root, parts, matrix=of_query).rows
        laid = _lay(
            key,
            key_mean,
            root,
            parts,
            other_mean=query_mean,
            other_root=query_root,
            matrix=of_key,
        )
        k, weights = laid.rows, laid.exponents
        if weights is not None:
            weights = weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
        # Values lie on the grid of their dtype, so the mean is rounded away alike in all of
        # them, an error that does not average out.
        narrowed = value_mean is not None and operand_dtype(value.dtype) != torch.float32
        laid = _lay(value, value_mean, 1.0, parts, errors=narrowed)
        v, lost = laid.rows, laid.lost
        if value_mean is None:
            value_mean = query.new_zeros(batch * heads, value.shape[3], dtype=torch.float32)
        value_mean = value_mean.view(-1, value_dim)
        if lost is not None:
            value_mean += lost
        statistics = build(k, v, terms, weights=weights, config=config, finite=True)
        division = Division(out, value_mean, parts, eps, round_denominators)
        _, denominator = read(q, statistics, terms, value_dim, config=config, division=division)
    return denominator
