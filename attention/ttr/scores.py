"""How a student does on held-out queries: the metrics of `distillation`, on the device."""

from __future__ import annotations

import torch

from ..quality import cosine, nmse
from .student import Prediction, Target

TOP = 16
"""Keys of ``topk_overlap``."""

_TINY = 1e-30


def output_scores(prediction: Prediction, target: Target) -> dict[str, torch.Tensor]:
    """Scores of outputs and masses.

    Args:
        prediction: of held-out queries.
        target: of the same.

    Returns:
        0-dimensional float32 tensors by metric; nothing waits for the device.
    """
    out, exact = prediction.out.float(), target.out.float()
    root = exact.square().mean().sqrt().clamp_min(_TINY)
    error = (out - exact).abs().flatten() / root
    high, highest = _quantile(error, 0.95), _quantile(error, 0.99)
    scores = {
        "nmse": nmse(out, exact),
        "cosine": cosine(out, exact),
        "norm_ratio": out.norm() / exact.norm().clamp_min(_TINY),
        "mean_ratio": out.abs().mean() / exact.abs().mean().clamp_min(_TINY),
        "std_ratio": out.std() / exact.std().clamp_min(_TINY),
        "error_p95": high,
        "error_p99": highest,
    }
    if prediction.log_mass is not None:
        scores["log_mass_bias"] = (prediction.log_mass - target.log_mass).mean()
    return scores


def weight_scores(weights: torch.Tensor, exact: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of attention weights.

    Args:
        weights: the student's, ``[B, H, S, N]``, summing to 1.
        exact: the teacher's, likewise.

    Returns:
        0-dimensional float32 tensors by metric.
    """
    logs = exact.clamp_min(_TINY).log() - weights.clamp_min(_TINY).log()
    top = min(TOP, exact.shape[-1])
    wanted = exact.topk(top, dim=-1).indices
    found = weights.topk(top, dim=-1).indices
    marked = torch.zeros_like(exact).scatter_(-1, found, 1.0)
    return {
        "attention_kl": (exact * logs).sum(dim=-1).mean(),
        "topk_overlap": marked.gather(-1, wanted).mean(),
    }


def exact_weights(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """The teacher's weights of a few queries: ``[B, H, S, N]`` float32.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, H, N, D]``.
        scale: factor on q·k.
    """
    logits = torch.matmul(query.float(), key.float().transpose(-2, -1)) * scale
    return torch.softmax(logits, dim=-1)


def _quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The least value that ``share`` of all don't exceed."""
    rank = max(1, -(-len(values) * int(share * 100) // 100))
    return values.kthvalue(rank).values
