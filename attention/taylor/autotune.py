"""Auto-tune: a seeded search over the shaping of query and key in a run's first steps.

Candidates are scored side by side on some tokens of some calls: fewest calls that would fall back
first, then the normalised squared error against exact attention on the *unmodified* query and
key. One set of values serves all layers, so that what is in force stays one set of settings.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from .. import gates, masks
from ..quality import exact_rows, nmse, sampled_indices
from ..settings import TaylorSettings
from ..variant import Call, LayerId, Tuning
from . import blocks, direct, kernel
from .attend import Options, taylor_attention
from .shaping import shape


def candidates(settings: TaylorSettings) -> list[TaylorSettings]:
    """What is tried: the settings in force, and others drawn from the ranges that they name.

    Half of those drawn leave the norm power out, half the norm clip, so that either alone and
    the scale factor alone are tried too.
    """
    draw = random.Random(settings.auto_tune_seed)
    found = [settings]
    for _ in range(settings.auto_tune_candidates):
        power = draw.uniform(settings.auto_tune_power_min, settings.auto_tune_power_max)
        clip = draw.uniform(settings.auto_tune_clip_min, settings.auto_tune_clip_max)
        scale = draw.uniform(settings.auto_tune_scale_min, settings.auto_tune_scale_max)
        with_power, with_clip = draw.random() < 0.5, draw.random() < 0.5
        found.append(
            settings.model_copy(
                update={
                    "qk_normalize": False,
                    "qk_norm_power": round(power, 3) if with_power else 0.0,
                    "qk_norm_clip": round(clip, 2) if with_clip else 0.0,
                    "scale_mul": round(scale, 3),
                }
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Score:
    """What a candidate came to; the least is the best.

    Attributes:
        failed: share of the calls that would have fallen back to exact attention.
        nmse: mean over the calls; infinite where it is no number.
    """

    failed: float
    nmse: float

    @property
    def order(self) -> tuple[float, float]:
        return self.failed, self.nmse


def looked_at(layers: Sequence[LayerId], settings: TaylorSettings) -> frozenset[str] | None:
    """Layers whose calls are scored: spread over those that the gates let through.

    Returns:
        Their names; None for any, where the model's layers are unknown.
    """
    due = [
        str(layer)
        for layer in layers
        if gates.block_type(layer, settings.taylor_block_type) is None
        and gates.layers(layer, settings.taylor_layer_start, settings.taylor_layer_end) is None
    ]
    if not due:
        return None
    count = min(settings.auto_tune_samples, len(due))
    return frozenset(due[index * len(due) // count] for index in range(count))


class _Search:
    """One search, over the settings that were in force when it began."""

    def __init__(self, base: TaylorSettings, layers: Sequence[LayerId]) -> None:
        self.base = base
        self.tried = candidates(base)
        self.layers = looked_at(layers, base)
        self.scores: list[torch.Tensor] = []
        self.steps = 0
        self.in_step = 0

    def wants(self, call: Call) -> bool:
        if self.in_step >= self.base.auto_tune_samples:
            return False
        return self.layers is None or (call.layer is not None and str(call.layer) in self.layers)

    def result(self) -> list[Score]:
        """Waits for the device."""
        failed, errors = torch.stack(self.scores).mean(dim=0).T.tolist()
        return [
            Score(share, error if math.isfinite(error) else math.inf)
            for share, error in zip(failed, errors)  # noqa: B905
        ]


class Tuner:
    """The search of one run."""

    def __init__(self, layers: Sequence[LayerId] = ()) -> None:
        """
        Args:
            layers: of the model; empty where unknown.
        """
        self._layers = layers
        self._search: _Search | None = None
        self._done = False

    def watch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        options: Options,
        weights: torch.Tensor | None,
        sums: blocks.Sums = kernel.sums,
    ) -> None:
        """Score all candidates on a call, if it is one of those that are looked at.

        Nothing waits for the device; the scores stay there until `settle`.

        Args:
            query: ``[B, H, Nq, D]``, unmodified.
            key: ``[B, H, Nk, D]``, unmodified.
            value: ``[B, H, Nk, Dv]``.
            call: that is made, with `TaylorSettings`.
            options: of the expansion.
            weights: of the keys, ``[B or 1, H or 1, Nk]``; None for 1.
            sums: what computes the call's sums, and those of the candidates where the few tokens
                that are looked at are not better served by their logits.
        """
        settings = cast(TaylorSettings, call.settings)
        if not settings.auto_tune or self._done:
            return
        if self._search is None or self._search.base != settings:
            self._search = _Search(settings, self._layers)
        search = self._search
        if not search.wants(call):
            return
        search.in_step += 1
        most, seed = settings.auto_tune_max_tokens, settings.auto_tune_seed
        rows = sampled_indices(query.shape[2], most, seed, query.device)
        columns = sampled_indices(key.shape[2], most, seed, key.device)
        query, key = query.index_select(2, rows), key.index_select(2, columns)
        value = value.index_select(2, columns)
        mask = masks.query_rows(call.mask, rows)
        if mask is not None and mask.shape[3] != 1:
            mask = mask.index_select(3, columns)
        if weights is not None and weights.shape[2] != 1:
            weights = weights.index_select(2, columns)
        sizes = query.shape[2], key.shape[2], options.feature_width(query.shape[3])
        if direct.is_cheaper(*sizes, value.shape[3] // options.heads_per_head, settings.P):
            sums = direct.sums
        exact, _ = exact_rows(query, key, value, call.scale, mask)
        scores = []
        for tried in search.tried:
            shaped = shape(query, key, call.scale, tried, call.sigma)
            attended = taylor_attention(
                shaped.query,
                shaped.key,
                value,
                shaped.scale,
                tried.P,
                weights=weights,
                options=options,
                eps=tried.eps,
                sums=sums,
            )
            bad = (~(attended.denominator > tried.eps)).float().mean()
            fails = bad > tried.denom_fallback_frac_limit
            failed = fails.float() * float(tried.fallback_on_negative)
            scores.append(torch.stack([failed, nmse(attended.out, exact)]))
        search.scores.append(torch.stack(scores))

    def settle(self, settings: TaylorSettings) -> Tuning | None:
        """Between two steps: the outcome, once enough steps were looked at, else None.

        Reading the scores waits for the device, once per search.

        Args:
            settings: in force. Without ``auto_tune`` the search is forgotten, so that it can be
                switched on again.
        """
        if not settings.auto_tune:
            self._search, self._done = None, False
            return None
        search = self._search
        if self._done or search is None or search.base != settings:
            return None
        search.steps += search.in_step > 0
        search.in_step = 0
        if search.steps < settings.auto_tune_steps:
            return None
        self._search, self._done = None, True
        scores = search.result()
        best = min(range(len(scores)), key=lambda index: scores[index].order)
        before, after = scores[0], scores[best]
        detail = (
            f"mean NMSE {before.nmse:.3g} → {after.nmse:.3g}, calls that fall back "
            f"{before.failed:.0%} → {after.failed:.0%}, on {len(search.scores)} calls of "
            f"{search.steps} steps; {len(search.tried) - 1} candidates"
        )
        return Tuning(search.tried[best], before.nmse, after.nmse, detail)
