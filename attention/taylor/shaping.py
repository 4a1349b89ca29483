"""Shaping of query and key: smaller norms, so that the series stays in its range.

Shaping changes the operator: attention of shaped query and key is softer than the model's own.
What it costs shows in the difference between the metrics ``nmse`` and ``nmse_eff``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..settings import TaylorSettings
from ..variant import Effective


@dataclass(frozen=True, slots=True)
class NormRule:
    """How the norm n of each query and key changes: to ``min(clip, n^(1 - power))``.

    Attributes:
        power: share of the norm that is taken out, in the exponent; 1 gives unit norm.
        clip: largest norm that is left; 0 for none.
    """

    power: float = 0.0
    clip: float = 0.0

    @property
    def changes(self) -> bool:
        return self.power > 0.0 or self.clip > 0.0

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        """What a vector of this norm is multiplied by.

        Args:
            norm: float32 or float64, not negative. 0 gives a finite factor; NaN stays NaN.
        """
        norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
        factor = norm.pow(-self.power)
        if self.clip > 0.0:
            factor = factor * (self.clip / (norm * factor)).clamp_max(1.0)
        return factor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``[…, D]`` with the norms of the last dimension changed, in its own dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * self.factor(wide.norm(dim=-1, keepdim=True))).to(x.dtype)


def norm_rule(settings: TaylorSettings, sigma: float | None) -> NormRule:
    """The rule that is in force at a noise level.

    Args:
        settings: of the call. ``qk_normalize`` goes before ``qk_norm_power``.
        sigma: of the call. Unknown, it counts as above a limit that is set.
    """
    limit = settings.qk_norm_sigma_max
    if limit > 0.0 and (sigma is None or sigma > limit * (1.0 + 1e-6)):
        return NormRule()
    power = 1.0 if settings.qk_normalize else settings.qk_norm_power
    return NormRule(power, settings.qk_norm_clip)


def shape(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    settings: TaylorSettings,
    sigma: float | None,
) -> Effective:
    """Query, key and scale that the series expands; the very tensors given where nothing changes.

    Args:
        query: ``[B, H, Nq, D]``, any floating dtype.
        key: ``[B, H, Nk, D]``.
        scale: factor on q·k.
        settings: of the call.
        sigma: of the call; None where unknown.
    """
    rule = norm_rule(settings, sigma)
    scale *= settings.scale_mul
    if not rule.changes:
        return Effective(query, key, scale)
    return Effective(rule.apply(query), rule.apply(key), scale)
