"""What quality is measured with: samples of a sequence, exact attention of them, errors.

Everything here stays on the tensors' device and never waits for it.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from . import masks

_CHUNK_BYTES = 64 * 2**20
"""Working memory of the exact rows; heads are taken a few at a time to stay below it."""


@lru_cache(maxsize=64)
def sampled_indices(length: int, samples: int, seed: int, device: torch.device) -> torch.Tensor:
    """Indices spread over a whole sequence: one drawn from each of ``samples`` equal parts.

    The same arguments always give the same indices, so that steps and settings compare on the
    same queries.

    Args:
        length: tokens in the sequence.
        samples: how many; all of them where the sequence is shorter.
        seed: of the draw.
        device: of the answer.

    Returns:
        ``[min(samples, length)]`` int64, ascending.
    """
    count = min(samples, length)
    edges = torch.arange(count + 1, dtype=torch.int64) * length // count
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Calls can come under inference mode; a cached tensor must be usable outside it too.
    with torch.inference_mode(False):
        indices = edges[:-1] + (draw * (edges[1:] - edges[:-1])).to(torch.int64)
        if device.type == "cuda":
            # Only from pinned memory does a copy not wait for what the device still has to do.
            return indices.pin_memory().to(device, non_blocking=True)
        return indices.to(device)


def nmse(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Σ (out - exact)² / Σ exact², over all elements. 0-dimensional float32."""
    error = (out.float() - exact.float()).square().sum()
    return error / exact.float().square().sum()


def cosine(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Mean cosine over the last dimension. 0-dimensional float32."""
    return torch.nn.functional.cosine_similarity(out.float(), exact.float(), dim=-1).mean()


@lru_cache(maxsize=16)
def accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype can be had in float32 without copies: torch 2.8, CUDA."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    try:
        some = torch.empty(1, 16, 16, device=device, dtype=dtype)
        torch.bmm(some, some, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float32.

    Args:
        a: ``[B, H, S, D]``. Where ``b`` can be multiplied as it is, bfloat16 on CUDA, ``a`` is
            rounded to its dtype; else both are converted.
        b: ``[B, H, D, N]``.
    """
    if not accumulates(b.device, b.dtype):
        return torch.matmul(a.float(), b.float())
    flat = torch.bmm(a.to(b.dtype).flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
    return flat.view(*a.shape[:2], *flat.shape[1:])


def exact_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of a few queries, a few heads at a time.

    In float32, but for the weights of bfloat16 values on CUDA, which are rounded to bfloat16:
    float32 copies of all keys and values took three times as long. Against float64 that is an
    NMSE of 3e-6, as much as a bfloat16 output costs by itself; without it, below 1e-12.

    Args:
        query: ``[B, H, S, D]``, in the dtype of the key.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, Dv]``.
        scale: factor on q·k.
        mask: broadcasts to ``[B, H, S, Nk]``.

    Returns:
        The output, ``[B, H, S, Dv]``, and the logsumexp of the logits, ``[B, H, S]``; float32.
    """
    batch, heads, samples, head_dim = query.shape
    copied = 0
    if key.dtype != torch.float32 and not accumulates(key.device, key.dtype):
        copied = head_dim + value.shape[3]
    per_head = 4 * batch * key.shape[2] * (copied + 2 * samples)
    step = max(1, min(heads, _CHUNK_BYTES // max(1, per_head)))
    if step == heads:
        return _exact_heads(query, key, value, scale, mask)
    parts, masses = [], []
    for first in range(0, heads, step):
        some = slice(first, first + step)
        head_mask = mask if mask is None or mask.shape[1] == 1 else mask[:, some]
        out, mass = _exact_heads(query[:, some], key[:, some], value[:, some], scale, head_mask)
        parts.append(out)
        masses.append(mass)
    return torch.cat(parts, dim=1), torch.cat(masses, dim=1)


def _exact_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = masks.apply(product(query, key.transpose(-2, -1)).mul_(scale), mask)
    weights = torch.softmax(logits, dim=-1)
    # The largest weight is exp(largest logit - mass) and at least 1/Nk: two maxima tell the mass
    # for less than a logsumexp.
    mass = logits.amax(dim=-1) - weights.amax(dim=-1).log()
    return product(weights, value), mass
