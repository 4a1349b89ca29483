"""Centring of query, key and value: identities of softmax that a truncated series profits from.

``softmaxⱼ(q·kⱼ)`` doesn't change when one vector is taken from all keys, and

``exp(q·(k - k̄)) = exp((q - q̄)·(k - k̄)) · exp(q̄·(k - k̄))``,

whose second factor is a weight of the key. The series then only has to carry what depends on
query and key together. ``Σⱼ aⱼ vⱼ = v̄ + Σⱼ aⱼ (vⱼ - v̄)`` for attention weights, which sum to 1.

Nothing here waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Centred:
    """What goes into the expansion.

    Attributes:
        query: ``[B, H, Nq, D]``.
        key: ``[B, H, Nk, D]``, 0 where the weight was 0.
        value: ``[B, H, Nk, Dv]``, 0 where the weight was 0.
        weights: ``[B, H, Nk]``, or None for 1; the largest is at most 1 where queries are centred.
        value_mean: ``[B, H, 1, Dv]``, to add to the output; None where values aren't centred.
        key_mean: ``[B, H, 1, D]``, what was taken from the keys; None where they aren't centred.
        log_factor: ``[B, H, 1]``, log of what the weights were divided by so that the largest is
            1; None where queries aren't centred.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    weights: torch.Tensor | None
    value_mean: torch.Tensor | None
    key_mean: torch.Tensor | None = None
    log_factor: torch.Tensor | None = None


def mean(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean over tokens.

    Args:
        x: ``[B, H, N, D]``, finite.
        weights: ``[B or 1, H or 1, N]``, not negative; None for 1. All zero gives a mean of 0.

    Returns:
        ``[B, H, 1, D]``.
    """
    if weights is None:
        return x.mean(dim=2, keepdim=True)
    # Shares before the product: a sum of weights may overflow no more than they do.
    total = weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.matmul((weights / total)[:, :, None, :], x)


def key_factor(
    query_mean: torch.Tensor, key: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that hold ``exp(q̄·k)``, up to a common factor per head, which attention ignores.

    The largest weight is 1, so that nothing overflows.

    Args:
        query_mean: q̄, ``[B, H, 1, D]``.
        key: ``[B, H, Nk, D]``.
        weights: see `mean`.

    Returns:
        The weights, ``[B, H, Nk]``, and the log of the factor left out, ``[B, H, 1]``.
    """
    exponent = torch.matmul(key, query_mean.transpose(-2, -1)).squeeze(-1)
    if weights is not None:
        exponent = exponent + weights.log()
    # A head whose keys are all masked has no finite maximum; its weights are then all 0.
    top = exponent.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(exponent.dtype).min)
    return torch.exp(exponent - top), top


def centre(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    queries: bool,
    keys: bool,
    values: bool,
) -> Centred:
    """Take out means, over live keys only, in place: the tensors given are overwritten.

    Args:
        query: ``[B, H, Nq, D]``, its share of the scale folded in; float32 or float64.
        key: ``[B, H, Nk, D]``, likewise. What a weight of 0 masks may hold NaN.
        value: ``[B, H, Nk, Dv]``, likewise.
        weights: ``[B or 1, H or 1, Nk]``, a factor on each key's term; None for 1.
        queries: whether to take the query mean out; its factor goes into the weights.
        keys: whether to take the key mean out.
        values: whether to take the value mean out.
    """
    if weights is not None:
        weights = weights.to(key.dtype)
        dead = (weights == 0)[:, :, :, None]
        key.masked_fill_(dead, 0.0)
        value.masked_fill_(dead, 0.0)
    key_mean = log_factor = None
    if keys:
        key_mean = mean(key, weights)
        key.sub_(key_mean)
    if queries:
        query_mean = query.mean(dim=2, keepdim=True)
        query.sub_(query_mean)
        weights, log_factor = key_factor(query_mean, key, weights)
    value_mean = None
    if values:
        value_mean = mean(value, weights)
        value.sub_(value_mean)
    if weights is not None:
        weights = weights.expand(key.shape[:3])
    return Centred(query, key, value, weights, value_mean, key_mean, log_factor)
