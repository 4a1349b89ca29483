"""How good and how fast variants are on given tensors, against exact attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import masks
from .quality import cosine, sampled_indices
from .reasons import DESCRIPTIONS, Fallback
from .registry import VARIANTS
from .settings import VariantSettings
from .structured import logit_std
from .token_layout import TokenLayout
from .variant import Call, LayerId, Result, RunInfo, Variant, exact_flops

NO_PRE_ROPE = (
    "query and key before rotary embedding are missing: captured calls hold them only as rotated. "
    "Evaluate on synthetic heads, which have both, or read the NMSE of a live run"
)
"""What a variant lacks that needs them; `reasons` has what is true of a run."""

FLOAT64_TOKENS = 4608
"""Longest key for which the reference is computed in float64; above it is in float32."""


@dataclass(frozen=True)
class Case:
    """One attention call to evaluate on.

    Attributes:
        name: for people: a file or a synthetic set.
        layer: name of the block, or of the kind of head.
        step: index into the schedule.
        sigma: noise level; None where there is none.
        query: ``[B, H, Nq, D]``.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, D]``.
        scale: factor on q·k.
        mask: see ``masks``; None for none.
        layout: of the tokens; None where it isn't known.
        pre_rope: query and key before rotary embedding, shaped like them; None where they aren't
            known.
    """

    name: str
    layer: str
    step: int
    sigma: float | None
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    mask: torch.Tensor | None = None
    layout: TokenLayout | None = None
    pre_rope: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Configuration:
    """A variant with its settings, and the text that names it."""

    label: str
    variant: str
    settings: VariantSettings


@dataclass(frozen=True)
class Outcome:
    """What one configuration came to on one case. None: not measured, or not to be had.

    Attributes:
        case: the case's name.
        layer: see `Case`.
        step: see `Case`.
        sigma: see `Case`.
        tokens: keys.
        logit_std: standard deviation of the scaled logits after each row's mean is subtracted,
            over all heads; of all pairs, masked ones too.
        configuration: its label.
        reason: the gate or fallback for which exact attention ran instead, with its detail; else
            empty. Nothing is measured then.
        reference: dtype of the exact attention that the errors are against.
        queries: on how many queries a head they are measured.
        nmse: Σ (out - exact)² / Σ exact².
        cosine: mean over queries.
        log_mass_bias: mean over queries and heads of log(denominator) - log(exact denominator).
        ms: median time of a call.
        exact_ms: median time of torch's scaled_dot_product_attention.
        time_ratio: median over the pairs of ms / exact_ms.
        flops: estimate, a multiply-add counted as two.
        flops_ratio: over exact attention's.
    """

    case: str
    layer: str
    step: int
    sigma: float | None
    tokens: int
    logit_std: float
    configuration: str
    reason: str
    reference: str
    queries: int
    nmse: float | None = None
    cosine: float | None = None
    log_mass_bias: float | None = None
    ms: float | None = None
    exact_ms: float | None = None
    time_ratio: float | None = None
    flops: float | None = None
    flops_ratio: float | None = None


@dataclass(frozen=True)
class Reference:
    """Exact attention of some queries.

    Attributes:
        rows: ``[S]`` int64, which queries.
        out: ``[B, H, S, D]``.
        log_mass: ``[B, H, S]``, logsumexp of the scaled logits.
    """

    rows: torch.Tensor
    out: torch.Tensor
    log_mass: torch.Tensor


def reference(case: Case, queries: int, seed: int) -> Reference:
    """Exact attention, head by head, in float64 up to `FLOAT64_TOKENS` keys and float32 above.

    Args:
        case: what to attend to.
        queries: how many to look at, spread over the sequence; 0 takes all.
        seed: of the choice, which depends on nothing else but the length.
    """
    length = case.query.shape[2]
    rows = sampled_indices(length, queries or length, seed, case.query.device)
    dtype = torch.float64 if case.key.shape[2] <= FLOAT64_TOKENS else torch.float32
    some = case.query.index_select(2, rows)
    mask = masks.query_rows(case.mask, rows)
    outs, masses = [], []
    for head in range(some.shape[1]):
        chosen = slice(head, head + 1)
        head_mask = mask if mask is None or mask.shape[1] == 1 else mask[:, chosen]
        key = case.key[:, chosen].to(dtype)
        logits = some[:, chosen].to(dtype) @ key.transpose(-2, -1) * case.scale
        logits = masks.apply(logits, head_mask)
        masses.append(logits.logsumexp(dim=-1))
        # A query that may attend to nothing gets zeros.
        weights = torch.nan_to_num(torch.exp(logits - masses[-1][..., None]), nan=0.0)
        outs.append(weights @ case.value[:, chosen].to(dtype))
    return Reference(rows, torch.cat(outs, dim=1), torch.cat(masses, dim=1))


def evaluate(
    case: Case,
    configurations: Sequence[Configuration],
    *,
    queries: int = 512,
    seed: int = 0,
    pairs: int = 3,
) -> Iterator[Outcome]:
    """Measure configurations on a case, all on the same queries.

    Args:
        case: what to attend to.
        configurations: what to measure.
        queries: at how many the errors are measured; 0 for all. Times are of whole calls.
        seed: of the choice of queries.
        pairs: how often a call and exact attention are timed, in turn; 0 leaves times out.
    """
    exact = reference(case, queries, seed)
    of_heads = logit_std(case.query.float(), case.key.float(), case.scale)
    spread = float(of_heads.square().mean().sqrt())
    for configuration in configurations:
        yield _measure(case, configuration, exact, spread, pairs)


def _measure(
    case: Case, configuration: Configuration, exact: Reference, spread: float, pairs: int
) -> Outcome:
    variant = VARIANTS[configuration.variant]()
    kind, _, index = case.layer.rpartition(".")
    layer = LayerId(kind, int(index)) if kind and index.isdigit() else None
    sigma = () if case.sigma is None else (case.sigma, 0.0)
    variant.prepare(
        RunInfo(
            sigmas=sigma,
            layers=() if layer is None else (layer,),
            settings=configuration.settings,
        )
    )
    try:
        return _measured(case, configuration, variant, layer, exact, spread, pairs)
    finally:
        variant.finish()


def _measured(
    case: Case,
    configuration: Configuration,
    variant: Variant,
    layer: LayerId | None,
    exact: Reference,
    spread: float,
    pairs: int,
) -> Outcome:

    def outcome(reason: str = "", /, **measured: float | None) -> Outcome:
        return Outcome(
            case.name, case.layer, case.step, case.sigma, case.key.shape[2], spread,
            configuration.label, reason, str(exact.out.dtype).removeprefix("torch."),
            len(exact.rows), **measured,
        )  # fmt: skip

    def call(log_mass_rows: torch.Tensor | None = None) -> Call:
        return Call(
            settings=configuration.settings,
            layer=layer,
            sigma=case.sigma,
            step=case.step,
            scale=case.scale,
            mask=case.mask,
            log_mass_rows=log_mass_rows,
            layout=case.layout,
            pre_rope=case.pre_rope if variant.wants_pre_rope else None,
        )

    gate = variant.gate(case.query, case.key, call())
    if gate is not None:
        return outcome(f"{gate.value}: {DESCRIPTIONS[gate.value]}")
    result = variant.attend(case.query, case.key, case.value, call(exact.rows))
    if result.gate is not None:
        detail = result.detail or DESCRIPTIONS[result.gate.value]
        return outcome(f"{result.gate.value}: {detail}")
    if result.fallback is not None:
        if result.fallback is Fallback.PRE_ROPE:
            return outcome(f"{result.fallback.value}: {NO_PRE_ROPE}")
        detail = result.detail or DESCRIPTIONS[result.fallback.value]
        return outcome(f"{result.fallback.value}: {detail}")
    errors = _errors(result, case, exact)
    flops = variant.flops(case.query.shape, case.key.shape, configuration.settings, case.layout)
    times: tuple[float | None, float | None, float | None] = (None, None, None)
    if pairs > 0:

        def work() -> object:
            attended = variant.attend(case.query, case.key, case.value, call()).out
            return _sdpa(case) if attended is None else attended

        times = _alternate(work, lambda: _sdpa(case), pairs, case.query.device)
    return outcome(
        **errors,
        ms=times[0],
        exact_ms=times[1],
        time_ratio=times[2],
        flops=flops,
        flops_ratio=flops / exact_flops(case.query.shape, case.key.shape),
    )


def _errors(result: Result, case: Case, exact: Reference) -> dict[str, float | None]:
    # A variant that leaves attention alone is torch's own, with its rounding.
    whole = _sdpa(case) if result.out is None else result.out
    out = whole.index_select(2, exact.rows).to(exact.out.dtype)
    bias = None
    if result.log_mass is not None:
        difference = result.log_mass - exact.log_mass
        bias = float(difference[exact.log_mass.isfinite()].mean())
    return {
        "nmse": float((out - exact.out).square().sum() / exact.out.square().sum()),
        "cosine": float(cosine(out, exact.out)),
        "log_mass_bias": bias,
    }


def _sdpa(case: Case) -> torch.Tensor:
    mask = case.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(case.query.dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        case.query, case.key, case.value, attn_mask=mask, scale=case.scale
    )


def _alternate(
    work: Callable[[], object], exact: Callable[[], object], pairs: int, device: torch.device
) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median of the pairs' ratios."""
    mine: list[float] = []
    theirs: list[float] = []
    _time(exact, device)
    for pair in range(pairs):
        order = [(work, mine), (exact, theirs)]
        for what, times in order if pair % 2 else reversed(order):
            times.append(_time(what, device))
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    return statistics.median(mine), statistics.median(theirs), statistics.median(ratios)


def _time(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
