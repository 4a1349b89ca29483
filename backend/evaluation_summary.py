"""Medians of what ``attnscope evaluate`` measured, by noise level and configuration."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..attention.evaluation import Outcome

MEASURED = (
    ("nmse", "NMSE", ".3g"), ("cosine", "cosine", ".4f"), ("log_mass_bias", "mass bias", "+.3f"),
    ("ms", "ms", ".1f"), ("exact_ms", "exact ms", ".1f"), ("time_ratio", "time ÷", ".2f"),
    ("flops", "GFLOP", ".2f"), ("flops_ratio", "FLOP ÷", ".3f"),
)  # fmt: skip
"""Fields of an `Outcome` with their headings and formats."""

_WIDTH = 10


@dataclass(frozen=True)
class Median:
    """One configuration on the calls of one length and noise level.

    Attributes:
        tokens: keys of these calls.
        at: ``σ 0.9``, or where there is no sigma ``std 2``, the standard deviation of the logits.
        configuration: its label.
        calls: how many there were.
        exact_instead: on how many of them a gate or fallback ran exact attention.
        logit_std: median over all of them.
        medians: by field, over the others; None where nothing was measured.
    """

    tokens: int
    at: str
    configuration: str
    calls: int
    exact_instead: int
    logit_std: float
    medians: dict[str, float | None]


def medians(outcomes: Sequence[Outcome]) -> list[Median]:
    """Groups in the order in which they first occur."""
    groups: dict[tuple[int, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        sigma, std = outcome.sigma, outcome.logit_std
        at = f"std {std:.2g}" if sigma is None else f"σ {sigma:.3g}"
        groups.setdefault((outcome.tokens, at, outcome.configuration), []).append(outcome)
    places = list(dict.fromkeys(key[:2] for key in groups))
    # A configuration stands below the others of its place, whichever call was measured first.
    ordered = sorted(groups, key=lambda key: places.index(key[:2]))
    return [
        Median(
            *key,
            calls=len(group),
            exact_instead=sum(bool(outcome.reason) for outcome in group),
            logit_std=statistics.median(outcome.logit_std for outcome in group),
            medians={name: _median(group, name) for name, _, _ in MEASURED},
        )
        for key in ordered
        for group in (groups[key],)
    ]


def _median(group: Sequence[Outcome], name: str) -> float | None:
    values = [getattr(outcome, name) for outcome in group]
    return statistics.median(there) if (there := [v for v in values if v is not None]) else None


def table(outcomes: Sequence[Outcome]) -> str:
    """`medians` as lines of text."""

    def line(place: Sequence[str], cells: Sequence[str], label: str) -> str:
        tokens, at, std, calls, exact = place
        numbers = " ".join(f"{cell:>{_WIDTH}}" for cell in cells)
        return f"{tokens:>6} {at:<9} {std:>5} {calls:>5} {exact:>5} {numbers} {label}"

    lines = [
        line(
            ("tokens", "at", "std", "calls", "exact"),
            [title for _, title, _ in MEASURED],
            "configuration",
        )
    ]
    for row in medians(outcomes):
        cells = []
        for name, _, form in MEASURED:
            value = row.medians[name]
            if value is not None and name == "flops":
                value /= 1e9
            cells.append("–" if value is None else format(value, form))
        place = (
            str(row.tokens), row.at, f"{row.logit_std:.2f}", str(row.calls),
            str(row.exact_instead),
        )  # fmt: skip
        lines.append(line(place, cells, row.configuration))
    return "\n".join(lines)
