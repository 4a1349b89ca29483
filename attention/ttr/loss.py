"""What an update lowers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, huber_loss

from .student import Prediction, Target

_LEAST = 1e-12
"""Below this a root mean square or a share counts as none."""


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Attributes:
    huber_beta: where errors begin to count linearly, relative to the teacher's root mean square.
    cosine_weight: of the cosine distance.
    far_weight: of the far part.
    """

    huber_beta: float
    cosine_weight: float
    far_weight: float


@dataclass(frozen=True, slots=True)
class Loss:
    """0-dimensional tensors, none of which waits for a device.

    Attributes:
        total: what is differentiated.
        huber: of the output relative to the teacher's root mean square, over beta.
        cosine: 1 - cosine per token and head, mean.
        far: Huber of the far output and of the log of the far mass, weighted by the far part's
            share of the teacher's mass; None for a student without a far part.
    """

    total: torch.Tensor
    huber: torch.Tensor
    cosine: torch.Tensor
    far: torch.Tensor | None


def loss(prediction: Prediction, target: Target, options: LossOptions) -> Loss:
    """Compare a student with its teacher.

    Args:
        prediction: of some queries.
        target: of the same.
        options: weights.
    """
    exact = target.out
    root = exact.square().mean().sqrt().clamp_min(_LEAST)
    beta = options.huber_beta
    huber = huber_loss(prediction.out / root, exact / root, delta=beta) / beta
    cosine = (1.0 - cosine_similarity(prediction.out, exact, dim=-1)).mean()
    total = huber + options.cosine_weight * cosine
    far = _far_loss(prediction, target, root, beta)
    if far is not None:
        total = total + options.far_weight * far
    return Loss(total, huber, cosine, far)


def _far_loss(
    prediction: Prediction, target: Target, root: torch.Tensor, beta: float
) -> torch.Tensor | None:
    far_out, far_log_mass = prediction.far_out, prediction.far_log_mass
    near_out, near_log_mass = prediction.near_out, prediction.near_log_mass
    if far_out is None or far_log_mass is None or near_out is None or near_log_mass is None:
        return None
    # With m the mass: far = whole - near. Both come of sums in float32, so that a share below
    # their rounding error says nothing.
    log_near = (near_log_mass - target.log_mass).clamp_max(0.0)
    share = -torch.expm1(log_near)
    # A replayed call's keys are rounded and its mass is not: a row without a far part can seem to
    # have one.
    known = (share > _LEAST_SHARE) & far_log_mass.isfinite()
    share = torch.where(known, share, 0.0)
    least = share.clamp_min(_LEAST_SHARE)
    log_exact = target.log_mass + least.log()
    # Rows without a far part have -inf, whose gradient would be NaN.
    difference = torch.where(known, far_log_mass - log_exact, 0.0)
    mass = huber_loss(difference, torch.zeros_like(difference), reduction="none")
    exact = (target.out - near_out * log_near.exp().unsqueeze(-1)) / least.unsqueeze(-1)
    out = huber_loss(far_out / root, exact / root, reduction="none", delta=beta).mean(-1) / beta
    return (share * (mass + out)).mean()


_LEAST_SHARE = 1e-4
"""Of a teacher's mass; the outputs of bfloat16 models tell no less."""
