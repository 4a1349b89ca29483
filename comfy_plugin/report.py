"""One line of the log per step, and one per run: what a person at the terminal wants to know."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ..attention.metrics import BY_NAME, worst
from ..wire import ReasonCount, RunEnded, StepClosed

log = logging.getLogger("attnscope")

Column = Sequence[float | None]


def _known(column: Column) -> list[float]:
    return [value for value in column if value is not None and not math.isnan(value)]


def _least(pick: Callable[[list[float]], float], column: Column) -> str:
    known = _known(column)
    return f"{pick(known):.3g}" if known else "-"


def _worst(step: StepClosed, name: str) -> str:
    found = worst(BY_NAME[name], step.layers.metrics.get(name, ()))
    if found is None:
        return ""
    index, value = found
    return f"{value:.3g} ({step.layers.layer[index]})"


def _counted(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in items)


def reasons(counts: Iterable[ReasonCount], kind: str) -> Counter[str]:
    """Calls per reason, over the layers."""
    totals: Counter[str] = Counter()
    for item in counts:
        if item.kind == kind:
            totals[item.reason] += item.count
    return totals


def step_line(step: StepClosed, steps_total: int) -> str:
    """A step in one line.

    Worst NMSE, raw and after shaping, with their layers; least denominator and most bad ones, of
    the probe too; range of sampled q·k; norms; largest head dimension and R; what computed the
    sums of how many layers, and how many took which path; calls that were gated and that fell
    back, by reason. What wasn't measured is left out.
    """
    metrics = step.layers.metrics
    parts = []
    raw, effective = _worst(step, "nmse"), _worst(step, "nmse_eff")
    if raw:
        parts.append(f"worst NMSE {raw}, eff {effective}")
    for title, least, share in (
        ("denominators", "denom_min", "denom_bad_frac"),
        ("probe", "probe_denom_min", "probe_bad_frac"),
    ):
        if _known(metrics.get(least, ())):
            low, bad = _least(min, metrics[least]), _least(max, metrics.get(share, ()))
            parts.append(f"{title} from {low}, bad {bad}")
    if _known(metrics.get("qk_p01", ())):
        low, high = _least(min, metrics["qk_p01"]), _least(max, metrics.get("qk_p99", ()))
        norms = f"|q| {_least(max, metrics.get('q_norm', ()))}"
        norms += f" |k| {_least(max, metrics.get('k_norm', ()))}"
        parts.append(f"q·k {low} to {high}, {norms}")
    if _known(metrics.get("head_dim", ())):
        dims = f"head_dim {max(_known(metrics['head_dim'])):.0f}"
        features = _known(metrics.get("feature_dim", ()))
        parts.append(dims + (f", R {max(features):.0f}" if features else ""))
    sums = Counter(
        BY_NAME["sums_path"].text(code) for code in _known(metrics.get("sums_path", ()))
    )
    if sums:
        parts.append(f"sums by {_counted(sums.most_common())}")
    parts.append(f"path {_counted(Counter(step.layers.path).most_common())}")
    for kind, title in (("gate", "gated"), ("fallback", "fell back")):
        totals = reasons(step.reasons, kind)
        if totals:
            parts.append(f"{title} {_counted(totals.most_common())}")
    total = f"/{steps_total}" if steps_total else ""
    return f"step {step.step + 1}{total} sigma {step.sigma:.4g}: {'; '.join(parts)}"


class Report(Protocol):
    """Is told of a run's steps and of its end, where events are built."""

    def step(self, step: StepClosed) -> None:
        """A step is closed."""

    def end(self, ended: RunEnded) -> None:
        """The run is over."""


class Reports:
    """Several reports as one. None of them can cost another one, or the event, anything."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self._reports = reports

    def step(self, step: StepClosed) -> None:
        """A step is closed."""
        self._tell(lambda report: report.step(step))

    def end(self, ended: RunEnded) -> None:
        """The run is over."""
        self._tell(lambda report: report.end(ended))

    def _tell(self, tell: Callable[[Report], None]) -> None:
        for report in self._reports:
            try:
                tell(report)
            except Exception:
                log.exception("AttnScope: a report failed")


class RunReport:
    """Sums up a run for the log, step by step.

    It is called where events are built, on the link's thread.
    """

    def __init__(self, steps_total: int, say: Callable[[str], None]) -> None:
        """
        Args:
            steps_total: of the schedule.
            say: takes each line.
        """
        self._total = steps_total
        self._say = say
        self._steps = 0
        self._calls = self._made = 0
        self._worst: tuple[float, str] | None = None
        self._gated: Counter[str] = Counter()
        self._fell_back: Counter[str] = Counter()

    def step(self, step: StepClosed) -> None:
        """A step is closed."""
        self._say(step_line(step, self._total))
        self._steps += 1
        self._calls += sum(step.layers.calls)
        self._made += sum(step.layers.calls_variant)
        self._gated += reasons(step.reasons, "gate")
        self._fell_back += reasons(step.reasons, "fallback")
        found = worst(BY_NAME["nmse"], step.layers.metrics.get("nmse", ()))
        if found is not None:
            place = f"{step.layers.layer[found[0]]} at step {step.step + 1}"
            order = math.inf if math.isnan(found[1]) else found[1]
            if self._worst is None or order > self._worst[0]:
                self._worst = (order, place)

    def end(self, ended: RunEnded) -> None:
        """The run is over."""
        parts = [f"{self._made} of {self._calls} calls ran the variant"]
        if self._worst is not None:
            parts.append(f"worst NMSE {self._worst[0]:.3g} ({self._worst[1]})")
        for title, totals in (("gated", self._gated), ("fell back", self._fell_back)):
            if totals:
                parts.append(f"{title} {_counted(totals.most_common())}")
        self._say(
            f"run {ended.status} after {self._steps} steps, {ended.duration_ms / 1e3:.1f} s: "
            + "; ".join(parts)
        )
