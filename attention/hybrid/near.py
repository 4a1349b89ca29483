"""Exact attention together with its softmax mass, so that it can be joined with other parts.

torch's fused kernels know the mass and its public function doesn't hand it out, so the operators
behind that function are called. Where a device, a dtype or a version of torch doesn't have them,
the same is computed by plain products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Both = tuple[torch.Tensor, torch.Tensor]

_LOGITS_BYTES = 256 * 2**20
"""Logits that the plain path holds at a time."""

_refused: set[tuple[str, torch.dtype, int]] = set()
"""Device, dtype and head dimension for which the fused operators have failed."""


def attend_with_mass(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> Both:
    """softmax(scale · q·kᵀ)·v and the logsumexp of its logits.

    Args:
        query: ``[B, H, Nq, D]``, any floating dtype.
        key: ``[B, H, Nk, D]``, Nk at least 1.
        value: ``[B, H, Nk, Dv]``.
        scale: factor on q·k.

    Returns:
        The output ``[B, H, Nq, Dv]`` in the query's dtype, and ``[B, H, Nq]`` float32 (float64
        for float64 input).
    """
    fused = _fused(query, value)
    kind = (query.device.type, query.dtype, query.shape[3])
    if fused is not None and kind not in _refused:
        try:
            out, mass = fused(query, key, value, scale)
            return out, mass[:, :, : query.shape[2]]
        except torch.cuda.OutOfMemoryError:
            raise
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            _refused.add(kind)
    return plain(query, key, value, scale)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Both:
    """`attend_with_mass` by products of matrices, in float32 at least."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    columns, values = key.to(dtype).transpose(-2, -1), value.to(dtype)
    batch, heads, queries, _ = query.shape
    row_bytes = batch * heads * key.shape[2] * dtype.itemsize
    step = max(1, _LOGITS_BYTES // max(1, row_bytes))
    outs, masses = [], []
    for start in range(0, queries, step):
        logits = torch.matmul(query[:, :, start : start + step].to(dtype) * scale, columns)
        mass = logits.logsumexp(dim=-1, keepdim=True)
        outs.append(torch.matmul(logits.sub_(mass).exp_(), values))
        masses.append(mass.squeeze(-1))
    return torch.cat(outs, dim=2).to(query.dtype), torch.cat(masses, dim=2)


def working_bytes(
    rows: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """What `attend_with_mass` allocates, its outcome included.

    Args:
        rows: B·H.
        queries: Nq.
        keys: Nk.
        head_dim: D.
        value_dim: Dv.
        dtype: of query, key and value.
        device: where.
    """
    size = 8 if dtype == torch.float64 else 4
    outcome = rows * queries * (value_dim * dtype.itemsize + size)
    if _operator(head_dim, value_dim, dtype, device) is not None:
        return outcome
    copies = rows * keys * (head_dim + value_dim) * size if dtype.itemsize < size else 0
    step = min(queries, max(1, _LOGITS_BYTES // max(1, rows * keys * size)))
    # Of a block: logits, and queries times the scale or what becomes of the values.
    block = rows * step * size * (keys + max(head_dim, value_dim))
    return outcome + copies + block + rows * queries * value_dim * size


def _fused(
    query: torch.Tensor, value: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Both] | None:
    return _operator(query.shape[3], value.shape[3], query.dtype, query.device)


def _operator(
    head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Both] | None:
    if value_dim != head_dim:
        return None
    if device.type == "cpu":
        return _cpu
    if device.type != "cuda" or dtype == torch.float64 or head_dim % 8:
        return None
    return _efficient if dtype == torch.float32 else _flash


def _cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Both:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, mass = operator(query, key, value, 0.0, False, scale=scale)
    return out, mass


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Both:
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    answer = operator(query, key, value, 0.0, False, False, scale=scale)
    return answer[0], answer[1]


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Both:
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    answer = operator(query, key, value, None, True, 0.0, False, scale=scale)
    return answer[0], answer[1]
