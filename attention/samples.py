"""Metrics of calls from samples of them: little is taken at the call, the rest for many at once.

A call leaves a `CallSample`: a few rows that stay on the device. `statistics` turns the samples of
a whole step into the metrics of ``metrics.py``, all calls of one shape in the same operations, so
that a step launches about as many kernels as a single call would. Nothing here waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import masks
from .quality import exact_rows, sampled_indices
from .variant import Effective

SAMPLED_KEYS = 64
"""Keys drawn for the q·k statistics. ``qk_std`` gets steadier with more of them; percentiles
hardly do, since a query's logits go together and few queries are drawn."""

_PERCENTILE_VALUES = 1024
"""Most logits of a call that the percentiles look at, thinned evenly: to order more would cost
more than all else."""

_PERCENTILES = {"qk_p01": 0.01, "qk_p50": 0.5, "qk_p99": 0.99}


# Not frozen: that makes it three times as slow to fill, and one is filled in every call.
@dataclass(slots=True)
class CallSample:
    """What a call leaves for its statistics, of S sampled queries and K sampled keys.

    Attributes:
        query: ``[B, H, S, D]``, in the call's dtype.
        key: ``[B, H, K, D]``, likewise.
        scale: factor on q·k.
        seen: ``[B, H, S, K]`` bool, which pairs the mask leaves; None for all.
        every_key: whether the sampled keys are all there are.
        approximate: ``[B, H, S, Dv]``, the variant's output; None where exact attention ran.
        exact: ``[B, H, S, Dv]`` float32, exact attention; None with ``approximate``.
        effective: ``[B, H, S, Dv]`` float32, exact attention on what was approximated; None where
            that is the call's own.
        mass_bias: ``[B, H, S]`` float32, log of the denominator that the output stands for, less
            the exact one's; None where the variant has no such number.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    seen: torch.Tensor | None
    every_key: bool
    approximate: torch.Tensor | None = None
    exact: torch.Tensor | None = None
    effective: torch.Tensor | None = None
    mass_bias: torch.Tensor | None = None

    @property
    def values(self) -> int:
        """How many numbers are held."""
        held = self.query.numel() + self.key.numel()
        if self.seen is not None:
            held += self.seen.numel()
        if self.exact is not None:
            # The output and the exact one, in the one way or in both.
            held += self.exact.numel() * (2 if self.effective is None else 3)
        return held

    @property
    def layout(self) -> tuple[object, ...]:
        """What samples have to share to be computed in the same operations."""
        return (
            self.query.device,
            self.query.dtype,
            self.query.shape,
            self.key.shape,
            self.scale,
            self.seen is None,
            self.every_key,
            None if self.exact is None else self.exact.shape,
            self.effective is None,
            self.mass_bias is None,
        )


def sample_call(
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
) -> CallSample:
    """Take from a call what its statistics need.

    The same queries serve all statistics. All heads are looked at, since heads differ; keys are
    drawn, so what is computed from logits is an estimate.

    Args:
        query: ``[B, H, Nq, D]``, unmodified, any floating dtype.
        key: ``[B, H, Nk, D]``, unmodified.
        value: ``[B, H, Nk, Dv]``.
        out: the variant's output ``[B, H, Nq, Dv]``; None where exact attention ran, which leaves
            out what compares.
        scale: factor on q·k.
        mask: four-dimensional, see ``masks``; masked pairs don't count.
        samples: queries to draw: those of `quality.sampled_indices`.
        seed: of the draws.
        effective: what the output approximates, where that is another attention.
        log_mass: ``[B, H, S]``, of the output at the drawn queries; None where it isn't known.
    """
    rows = sampled_indices(query.shape[2], samples, seed, query.device)
    columns = sampled_indices(key.shape[2], SAMPLED_KEYS, seed, key.device)
    some_queries = query.index_select(2, rows)
    row_mask = masks.query_rows(mask, rows)
    seen = None
    if row_mask is not None:
        pairs = row_mask if row_mask.shape[3] == 1 else row_mask.index_select(3, columns)
        seen = pairs if pairs.dtype == torch.bool else ~torch.isneginf(pairs)
        seen = seen.expand(*some_queries.shape[:3], columns.shape[0])
    approximate = exact = shaped = bias = None
    if out is not None:
        approximate = out.index_select(2, rows)
        exact, mass = exact_rows(some_queries, key, value, scale, row_mask)
        if effective is not None:
            shaped, mass = exact_rows(
                effective.query.index_select(2, rows),
                effective.key,
                value,
                effective.scale,
                row_mask,
            )
        if log_mass is not None:
            bias = log_mass - mass
    return CallSample(
        query=some_queries,
        key=key.index_select(2, columns),
        scale=scale,
        seen=seen,
        every_key=columns.shape[0] == key.shape[2],
        approximate=approximate,
        exact=exact,
        effective=shaped,
        mass_bias=bias,
    )


def statistics(samples: Sequence[CallSample]) -> list[dict[str, torch.Tensor]]:
    """The metrics of calls, computed together where their samples are alike.

    Returns:
        For each sample, metric name to a 0-dimensional float32 tensor on the sample's device.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        alike.setdefault(sample.layout, []).append(index)
    found: list[dict[str, torch.Tensor]] = [{} for _ in samples]
    for indices in alike.values():
        for name, column in _columns([samples[index] for index in indices]).items():
            for index, value in zip(indices, column.unbind(), strict=True):
                found[index][name] = value
    return found


def _columns(samples: Sequence[CallSample]) -> dict[str, torch.Tensor]:
    """Metric name to ``[L]``, of L samples of one layout."""
    first = samples[0]
    query = _stack([sample.query for sample in samples]).float()
    key = _stack([sample.key for sample in samples]).float()
    logits = _logits(query, key, first.scale)
    seen = None if first.seen is None else _stack([sample.seen for sample in samples])
    spread = _spread(logits, seen, first.every_key)
    # A logit that isn't finite has no place in an order. It leaves a spread that isn't either,
    # and that times 0 is NaN.
    percentiles = _percentiles(logits, seen).add(spread[:, None], alpha=0)
    columns = {
        "qk_std": spread,
        **dict(zip(_PERCENTILES, percentiles.unbind(dim=1), strict=True)),
        "q_norm": torch.linalg.vector_norm(query, dim=-1).flatten(1).mean(dim=1),
        "k_norm": torch.linalg.vector_norm(key, dim=-1).flatten(1).mean(dim=1),
    }
    if first.exact is not None:
        approximate = _stack([sample.approximate for sample in samples]).float()
        errors = _errors(approximate, _stack([sample.exact for sample in samples]))
        columns["nmse"], columns["cosine"] = errors
        if first.effective is not None:
            errors = _errors(approximate, _stack([sample.effective for sample in samples]))
        columns["nmse_eff"], columns["cosine_eff"] = errors
    if first.mass_bias is not None:
        bias = _stack([sample.mass_bias for sample in samples])
        columns["log_mass_bias"] = bias.flatten(1).mean(dim=1)
    return columns


def _logits(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """``[L, B, H, S, K]``: scaled products, in one operation."""
    rows, columns = query.flatten(0, 2), key.flatten(0, 2).transpose(1, 2)
    # Its content doesn't count with a beta of 0.
    out = query.new_empty(rows.shape[0], rows.shape[1], columns.shape[2])
    out.baddbmm_(rows, columns, beta=0, alpha=scale)
    return out.view(*query.shape[:4], columns.shape[2])


def _stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return torch.stack([tensor for tensor in tensors if tensor is not None])


def _errors(approximate: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NMSE and mean cosine, both ``[L]``, of rows ``[L, B, H, S, Dv]``; see ``metrics``."""
    error = (approximate - exact).square_().flatten(1).sum(dim=1)
    nmse = error / exact.square().flatten(1).sum(dim=1)
    cosine = torch.nn.functional.cosine_similarity(approximate, exact, dim=-1)
    return nmse, cosine.flatten(1).mean(dim=1)


def _spread(logits: torch.Tensor, seen: torch.Tensor | None, every_key: bool) -> torch.Tensor:
    """Standard deviation within rows, pooled over all rows.

    The squares are divided by one less than the sampled keys of each row, which makes the variance
    unbiased for that over all keys; where every key is there, by their number.

    Args:
        logits: ``[L, B, H, S, K]``.
        seen: the same shape, bool; None for all True.
        every_key: whether the K keys are all there are.

    Returns:
        ``[L]``; NaN where a logit that counts isn't finite, or too few count.
    """
    drawn = 0 if every_key else 1
    if seen is None:
        centred = logits - logits.mean(dim=-1, keepdim=True)
        degrees = math.prod(logits.shape[1:4]) * (logits.shape[4] - drawn)
        norm: torch.Tensor = torch.linalg.vector_norm(centred.flatten(1), dim=1)
        return norm.div_(degrees**0.5)
    counts = seen.sum(dim=-1, keepdim=True)
    means = logits.masked_fill(~seen, 0.0).sum(dim=-1, keepdim=True) / counts
    centred = (logits - means).masked_fill_(~seen, 0.0)
    free = (counts - drawn).clamp_min(0).flatten(1).sum(dim=1)
    return (centred.square_().flatten(1).sum(dim=1) / free).sqrt_()


def _percentiles(logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Percentiles by nearest rank: the least value that the wished share doesn't exceed.

    Args:
        logits: ``[L, B, H, S, K]``; NaN counts as the largest.
        seen: the same shape, bool; None for all True.

    Returns:
        ``[L, 3]``, in the order of `_PERCENTILES`; NaN where nothing was seen.
    """
    flat = logits.flatten(1)
    live = None if seen is None else seen.flatten(1)
    if flat.shape[1] > _PERCENTILE_VALUES:
        some = sampled_indices(flat.shape[1], _PERCENTILE_VALUES, 0, flat.device)
        flat = flat.index_select(1, some)
        live = None if live is None else live.index_select(1, some)
    if live is None:
        return _of_all(flat)
    ordered = flat.masked_fill(~live, float("inf")).sort(dim=1).values
    counts = live.sum(dim=1, keepdim=True)
    ranks = torch.cat([(counts * share).ceil() for share in _PERCENTILES.values()], dim=1)
    chosen = ordered.gather(1, ranks.to(torch.int64).sub_(1).clamp_min_(0))
    return chosen.masked_fill_(counts == 0, float("nan"))


def _of_all(values: torch.Tensor) -> torch.Tensor:
    """`_percentiles` of ``[L, V]``, selected: a full order would cost four times as much."""
    ranks = [max(1, math.ceil(share * values.shape[1])) for share in _PERCENTILES.values()]
    return torch.stack([values.kthvalue(rank, dim=1).values for rank in ranks], dim=1)
