"""The softmax mass that Taylor attention stands for: what its denominator says of it."""

from __future__ import annotations

import math

import torch

from .centring import Centred


def log_mass(
    denominator: torch.Tensor,
    weight_sum: torch.Tensor | float,
    query: torch.Tensor,
    scale: float,
    ready: Centred,
    eps: float,
) -> torch.Tensor:
    """Log of the approximated Σⱼ wⱼ exp(scale·q·kⱼ), comparable to a logsumexp of logits.

    With q̄ and k̄ the means that were taken out (0 where none was),

    ``q·k = (q - q̄)·(k - k̄) + q̄·(k - k̄) + q·k̄``.

    The series stands for the first part, the key weights for the second, and the third is common
    to all keys of a query. The denominator is relative to the sum of the weights, which were
    divided by a common factor, so the log mass is
    ``log(denominator) + log(weight_sum) + log_factor + q·k̄``.

    Args:
        denominator: ``[B, H, S, 1]``, see `attend.Attended`; divided by no less than ``eps``.
        weight_sum: of the weights that the expansion had, ``[B, H, 1, 1]``; their number where it
            had none.
        query: ``[B, H, S, D]``, any floating dtype, the queries of the denominators.
        scale: factor on q·k of a whole head, half of which is folded into ``ready``.
        ready: what was expanded, of whole heads.
        eps: least denominator.

    Returns:
        ``[B, H, S]`` float32.
    """
    series = denominator.float().clamp_min(eps).log()
    if isinstance(weight_sum, torch.Tensor):
        series = series + weight_sum.float().log()
    else:
        series = series + math.log(weight_sum)
    if ready.log_factor is not None:
        series = series + ready.log_factor[..., None].float()
    if ready.key_mean is not None:
        # The mean holds its own half of the scale.
        root = math.copysign(abs(scale) ** 0.5, scale)
        row = ready.key_mean.float().transpose(-2, -1)
        series = series + torch.matmul(query.float(), row).mul_(root)
    return series.squeeze(-1)


def mask_offset(mask: torch.Tensor) -> torch.Tensor | float:
    """What `masks.key_weights` leaves out of a mask, as a summand of the log mass.

    Args:
        mask: four-dimensional, the same for every query.

    Returns:
        ``[B or 1, H or 1, 1]`` float32, an additive mask's largest entry; 0 for a boolean mask.
    """
    if mask.dtype == torch.bool:
        return 0.0
    return mask[:, :, 0, :].float().amax(dim=-1, keepdim=True)
