"""How the metrics of ``metrics.py`` are computed from tensors.

Everything here stays on the tensors' device and never waits for it.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from . import masks
from .variant import Effective

SAMPLED_KEYS = 256
"""Keys sampled for the q·k statistics."""

_PERCENTILE_VALUES = 8192
"""Logits that the percentiles look at; sorting more would cost more than the attention."""

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
        return indices.to(device)


@lru_cache(maxsize=16)
def _percentile_marks(device: torch.device) -> torch.Tensor:
    """Kept, since copying them to a GPU at each call would wait for all that runs there."""
    with torch.inference_mode(False):
        return torch.tensor([0.01, 0.5, 0.99], device=device)


def nmse(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Σ (out - exact)² / Σ exact², over all elements. 0-dimensional float32."""
    error = (out.float() - exact.float()).square().sum()
    return error / exact.float().square().sum()


def cosine(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Mean cosine over the last dimension. 0-dimensional float32."""
    return torch.nn.functional.cosine_similarity(out.float(), exact.float(), dim=-1).mean()


def qk_statistics(
    query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None, seed: int
) -> dict[str, torch.Tensor]:
    """Spread of the scaled logits of some queries against some keys.

    Args:
        query: ``[B, H, S, D]``, sampled queries.
        key: ``[B, H, Nk, D]``, all keys, of which up to `SAMPLED_KEYS` are drawn.
        scale: factor on q·k.
        mask: of the sampled queries, broadcasts to ``[B, H, S, Nk]``; masked pairs don't count.
        seed: of the draw.

    Returns:
        ``qk_std``, ``qk_p01``, ``qk_p50``, ``qk_p99``, ``q_norm``, ``k_norm``; 0-dimensional.
    """
    columns = sampled_indices(key.shape[2], SAMPLED_KEYS, seed, key.device)
    some_keys = key.index_select(2, columns).float()
    some_queries = query.float()
    logits = torch.matmul(some_queries, some_keys.transpose(-2, -1)) * scale
    if mask is None:
        centred = logits - logits.mean(dim=-1, keepdim=True)
        spread = centred.square().mean().sqrt()
    else:
        seen = mask.index_select(3, columns) if mask.shape[3] != 1 else mask
        masked = masks.apply(logits, seen)
        logits = torch.where(torch.isneginf(masked), float("nan"), logits)
        centred = logits - logits.nanmean(dim=-1, keepdim=True)
        spread = centred.square().nanmean().sqrt()
    flat = logits.flatten()
    flat = flat[:: max(1, flat.numel() // _PERCENTILE_VALUES)]
    marks = _percentile_marks(flat.device)
    low, middle, high = (
        torch.quantile(flat, marks) if mask is None else torch.nanquantile(flat, marks)
    )
    return {
        "qk_std": spread,
        "qk_p01": low,
        "qk_p50": middle,
        "qk_p99": high,
        "q_norm": some_queries.norm(dim=-1).mean(),
        "k_norm": some_keys.norm(dim=-1).mean(),
    }


def exact_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of a few queries, in float32, a few heads at a time.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, Dv]``.
        scale: factor on q·k.
        mask: broadcasts to ``[B, H, S, Nk]``.

    Returns:
        The output, ``[B, H, S, Dv]``, and the logsumexp of the logits, ``[B, H, S]``; float32.
    """
    batch, heads, samples, head_dim = query.shape
    tokens = key.shape[2]
    per_head = 4 * batch * tokens * (head_dim + value.shape[3] + 2 * samples)
    step = max(1, min(heads, _CHUNK_BYTES // max(1, per_head)))
    parts, masses = [], []
    for first in range(0, heads, step):
        chosen = slice(first, first + step)
        logits = torch.matmul(query[:, chosen].float(), key[:, chosen].float().transpose(-2, -1))
        head_mask = mask if mask is None or mask.shape[1] == 1 else mask[:, chosen]
        logits = masks.apply(logits * scale, head_mask)
        masses.append(logits.logsumexp(dim=-1))
        parts.append(torch.matmul(torch.softmax(logits, dim=-1), value[:, chosen].float()))
    return torch.cat(parts, dim=1), torch.cat(masses, dim=1)


def sampled_stats(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor | None,
    scale: float,
    mask: torch.Tensor | None,
    samples: int,
    seed: int,
    *,
    effective: Effective | None = None,
    log_mass: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Metrics of one call on sampled queries, the same ones for all of them.

    Args:
        query: ``[B, H, Nq, D]``, unmodified.
        key: ``[B, H, Nk, D]``, unmodified.
        value: ``[B, H, Nk, Dv]``.
        out: the variant's output ``[B, H, Nq, Dv]``; None where exact attention ran, which
            leaves out the metrics that compare.
        scale: factor on q·k.
        mask: four-dimensional, see ``masks``.
        samples: queries to draw.
        seed: of the draws.
        effective: what the output approximates, where that is another attention.
        log_mass: of the output, ``[B, H, Nq]``; None leaves ``log_mass_bias`` out.

    Returns:
        Metric name to a 0-dimensional float32 tensor on the query's device.
    """
    rows = sampled_indices(query.shape[2], samples, seed, query.device)
    some_queries = query.index_select(2, rows)
    row_mask = masks.query_rows(mask, rows)
    stats = qk_statistics(some_queries, key, scale, row_mask, seed)
    if out is None:
        return stats
    approximate = out.index_select(2, rows)
    exact, mass = exact_rows(some_queries, key, value, scale, row_mask)
    stats["nmse"] = stats["nmse_eff"] = nmse(approximate, exact)
    stats["cosine"] = stats["cosine_eff"] = cosine(approximate, exact)
    if effective is not None:
        shaped = effective.query.index_select(2, rows)
        exact, mass = exact_rows(shaped, effective.key, value, effective.scale, row_mask)
        stats["nmse_eff"] = nmse(approximate, exact)
        stats["cosine_eff"] = cosine(approximate, exact)
    if log_mass is not None:
        stats["log_mass_bias"] = (log_mass.index_select(2, rows) - mass).mean()
    return stats
