"""Taylor attention of whole heads in Triton: prepared, summed and divided in few passes.

The same numbers as `attend` with the fully fused sums: scale, split, centring, sums, division.
There they are a dozen passes of torch over fp32 copies, which take longer than the sums; here
query, key and value are read twice, once for their means and once to be laid out.
"""

from __future__ import annotations

import math

import torch

from .triton_full import Division, build, read
from .triton_plan import FullConfig, check_config, default_config, padded
from .triton_support import interpreted, kernels, operand_dtype, rows_contiguous

_BLOCK_T = 64


def whole_bytes(queries: int, keys: int, head_dim: int, parts: int, size: int) -> int:
    """Bytes of the prepared copies of one head, value as wide as key; operands of ``size``."""
    return (queries + 2 * keys) * head_dim * size + 2 * keys * parts * 4


def _means(x: torch.Tensor) -> torch.Tensor:
    """``[BH, D]`` fp32, contiguous."""
    return x.mean(dim=2, dtype=torch.float32).flatten(0, 1)


def _lay(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    root: float,
    parts: int,
    *,
    other_mean: torch.Tensor | None = None,
    other_root: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slices ``[B, H · parts, N, D / parts]`` in the operands' dtype, and their exponents."""
    batch, heads, tokens, head_dim = x.shape
    width = head_dim // parts
    out = x.new_empty(batch, heads * parts, tokens, width, dtype=operand_dtype(x.dtype))
    exponents = None
    if other_mean is not None:
        exponents = x.new_empty(batch, heads * parts, tokens, dtype=torch.float32)
    kernels("triton_prepare_kernels").lay_kernel[
        (math.ceil(tokens / _BLOCK_T), batch * heads * parts)
    ](
        x,
        mean if mean is not None else x,
        other_mean if other_mean is not None else x,
        out,
        exponents if exponents is not None else x,
        heads,
        tokens,
        width,
        root,
        other_root,
        *x.stride()[:3],
        PARTS=parts,
        W=padded(width),
        BT=_BLOCK_T,
        CENTRE=mean is not None,
        EXPONENTS=exponents is not None,
        num_warps=4,
    )
    return out, exponents


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    terms: int,
    *,
    parts: int,
    centre_queries: bool,
    centre_keys: bool,
    centre_values: bool,
    round_denominators: bool,
    eps: float,
    out: torch.Tensor,
    config: FullConfig | None = None,
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
    config = config or default_config(head_dim // parts, value_dim, terms, query.dtype)
    check_config(config, head_dim // parts, value_dim, terms, operand_dtype(query.dtype))
    root = (abs(scale) * parts**0.5) ** 0.5
    query_root = root if scale >= 0 else -root
    with torch.cuda.device(query.device if query.is_cuda and not interpreted() else -1):
        query, key, value = (rows_contiguous(x) for x in (query, key, value))
        query_mean = _means(query) if centre_queries else None
        value_mean = _means(value) if centre_values else None
        q, _ = _lay(query, query_mean, query_root, parts)
        k, exponents = _lay(
            key,
            _means(key) if centre_keys else None,
            root,
            parts,
            other_mean=query_mean,
            other_root=query_root,
        )
        v, _ = _lay(value, value_mean, 1.0, parts)
        weights = None
        if exponents is not None:
            weights = exponents.sub_(exponents.amax(dim=-1, keepdim=True)).exp_()
        statistics = build(k, v, terms, weights=weights, config=config, finite=True)
        if value_mean is None:
            value_mean = query.new_zeros(batch * heads, value.shape[3], dtype=torch.float32)
        elif v.dtype != torch.float32:
            # Values lie on the grid of their dtype, so the mean is rounded away alike in all of
            # them, an error that does not average out. What was really taken out is added again.
            value_mean -= _means(v).view_as(value_mean)
        division = Division(out, value_mean.view(-1, value_dim), parts, eps, round_denominators)
        _, denominator = read(q, statistics, terms, value_dim, config=config, division=division)
    return denominator
