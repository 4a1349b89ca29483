"""The error-budget router as a variant: measures candidates, plans steps, hands calls on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch

from .. import masks
from ..attending import ATTENDING
from ..quality import exact_rows, sampled_indices
from ..reasons import Choice, Gate
from ..settings import VariantSettings
from ..settings.candidates import Candidate, parse
from ..settings.router import RouterSettings
from ..token_layout import TokenLayout
from ..variant import Call, LayerId, Result, RunInfo, Tuning, Variant, exact_flops
from .bins import sigma_bin, token_class
from .calibration import Calibration, Rows, error_sums
from .explain import explain
from .policy import Budget, Decision, LayerOptions, Option, budget_of, plan
from .table import EXACT, Cell, Table, Timed

log = logging.getLogger("attnscope")

_SEED = 7919
"""Added to the seed of the quality's queries, so that others are drawn here."""


@dataclass(frozen=True)
class _Entry:
    """A candidate at work in one run."""

    candidate: Candidate
    variant: Variant
    settings: VariantSettings

    @property
    def name(self) -> str:
        return self.candidate.name

    def call(self, call: Call, layer: LayerId | None = None) -> Call:
        """The call as the candidate's own."""
        return replace(call, settings=self.settings, layer=layer or call.layer)


@dataclass(frozen=True)
class _LayerPlan:
    """What a layer does in a step, and why."""

    decision: Decision
    detail: str
    measures: tuple[_Entry, ...]


@dataclass(frozen=True)
class _StepPlan:
    settings: RouterSettings
    budget: Budget
    layers: Mapping[str, _LayerPlan]


class RouterVariant(Variant):
    """For each layer and step the cheapest candidate whose predicted error fits a budget."""

    name: ClassVar[str] = "router"
    title: ClassVar[str] = "Error-budget router"
    settings_model: ClassVar[type[VariantSettings]] = RouterSettings
    tells_log_mass: ClassVar[bool] = True
    times_calls: ClassVar[bool] = True

    def __init__(self) -> None:
        self.prepare(RunInfo(sigmas=()))

    def prepare(self, run: RunInfo) -> None:
        settings = cast(RouterSettings, run.settings or RouterSettings())
        self._layers = list(run.layers)
        self._store = run.tables
        self._table = Table() if run.tables is None else run.tables.load()
        self._calibration = Calibration(run.clock)
        self._entries = tuple(_entry(one, run) for one in parse(settings.candidates))
        self._calibration.scores.candidates = {
            entry.candidate.id: entry.candidate.text for entry in self._entries
        }
        self._failed: set[str] = set()
        self._step = -1
        self._plans: dict[tuple[int, ...], _StepPlan] = {}
        self.wants_pre_rope = any(entry.variant.wants_pre_rope for entry in self._entries)

    @classmethod
    def needs_pre_rope(cls, settings: VariantSettings) -> bool:
        found = parse(cast(RouterSettings, settings).candidates)
        return any(ATTENDING[one.variant].needs_pre_rope(one.settings) for one in found)

    def retune(self, settings: VariantSettings) -> Tuning | None:
        """Read what the step's calls have left. Candidates keep their settings: what is measured
        of them holds for these alone."""
        self._calibration.settle()
        return None

    def close(self, completed: bool) -> None:
        """Hand on what the run has measured. Of a run that broke off it says too little: its
        errors are the largest of steps that a whole run would have more of."""
        self._calibration.settle()
        for entry in self._entries:
            entry.variant.close(completed)
        if completed and self._store is not None:
            self._store.add(self._calibration.scores)

    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        settings = cast(RouterSettings, call.settings)
        if not settings.enabled or settings.quality_speed <= 0.0:
            return Gate.DISABLED
        if call.layer is None:
            return Gate.LAYER_UNKNOWN
        return Gate.SIGMA_UNKNOWN if call.sigma is None else None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        step = self._plan(query, key, call)
        mine = step.layers[str(call.layer)]
        chosen = mine.decision.chosen
        if chosen is None:
            assert mine.decision.reason is not None
            result = Result(None, gate=mine.decision.reason, detail=mine.detail)
            entry = None
        else:
            entry = next(entry for entry in self._entries if entry.name == chosen.name)
            attended = entry.variant.attend(query, key, value, entry.call(call))
            result = _told(attended, entry, chosen, mine.detail, step.budget)
        if not mine.measures:
            return result

        def afterwards(start: Any, end: Any) -> None:
            self._measure(mine.measures, entry, result.out, query, key, value, call, start, end)

        return replace(result, afterwards=afterwards)

    def _plan(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> _StepPlan:
        """The plan of the step, made at its first call of each shape."""
        settings = cast(RouterSettings, call.settings)
        if call.step != self._step:
            self._step, self._plans = call.step, {}
        shape = (*query.shape, key.shape[2])
        known = self._plans.get(shape)
        if known is None or known.settings is not settings:
            known = self._plans[shape] = self._made_plan(query, key, call, settings)
        elif str(call.layer) not in known.layers:
            # A model that didn't announce the layer: it is planned with the next step's.
            unknown = Decision(str(call.layer), None, reason=Gate.ROUTER_UNMEASURED)
            detail = "the model had not announced this layer"
            layers = {**known.layers, str(call.layer): _LayerPlan(unknown, detail, ())}
            known = self._plans[shape] = replace(known, layers=layers)
        return known

    def _made_plan(
        self, query: torch.Tensor, key: torch.Tensor, call: Call, settings: RouterSettings
    ) -> _StepPlan:
        assert call.layer is not None and call.sigma is not None
        if call.layer not in self._layers:
            self._layers.append(call.layer)
        costs = _Costs(self._table, settings, self._calibration.clock is not None, query, key)
        kept_out: dict[str, list[tuple[str, Gate]]] = {}
        options: list[LayerOptions] = []
        due: dict[str, list[tuple[_Entry, Cell]]] = {}
        for layer in self._layers:
            name = str(layer)
            kept_out[name], due[name], found = [], [], []
            for entry in self._entries:
                gate = entry.variant.gate(query, key, entry.call(call, layer))
                if gate is not None:
                    kept_out[name].append((entry.name, gate))
                    continue
                cell = Cell(
                    entry.candidate.id, name, sigma_bin(call.sigma), token_class(key.shape[2])
                )
                due[name].append((entry, cell))
                found.append(self._option(entry, cell, costs, call.layout, settings))
            options.append(LayerOptions(name, costs.exact(name), tuple(found)))
        budget = budget_of(settings, len(self._layers))
        decisions = plan(options, budget)
        layers = {}
        for index, layer_options in enumerate(options):
            name = layer_options.layer
            decision = decisions[name]
            if not layer_options.options and kept_out[name]:
                decision = replace(decision, reason=kept_out[name][0][1])
            detail = explain(
                layer_options, decision, budget, costs.unit,
                runs={entry.name: self._table.measured(cell) for entry, cell in due[name]},
                min_runs=settings.min_runs, kept_out=kept_out[name],
            )  # fmt: skip
            measures = self._measured(index, due[name], settings)
            layers[name] = _LayerPlan(decision, detail, measures)
        return _StepPlan(settings, budget, layers)

    def _option(
        self,
        entry: _Entry,
        cell: Cell,
        costs: _Costs,
        layout: TokenLayout | None,
        settings: RouterSettings,
    ) -> Option:
        cost = costs.of(entry, cell.layer, layout)
        enough = self._table.measured(cell) >= settings.min_runs
        predicted = self._table.predicted(cell) if enough else None
        if predicted is None or entry.candidate.id in self._failed:
            return Option(entry.name, None, cost=cost)
        # What this run has measured itself is no prediction any more.
        row = self._calibration.scores.errors.get(cell)
        own_layer, own_group = (row[0], max(row[1:], default=row[0])) if row else (0.0, 0.0)
        return Option(
            entry.name, max(predicted.layer, own_layer), max(predicted.group, own_group), cost
        )

    def _measured(
        self, index: int, due: Sequence[tuple[_Entry, Cell]], settings: RouterSettings
    ) -> tuple[_Entry, ...]:
        """The candidates that are measured at a layer in this run."""
        if not settings.learn:
            return ()
        every, runs = settings.recheck_runs, self._table.runs
        again = every > 0 and (index + runs) % every == 0
        return tuple(
            entry
            for entry, cell in due
            if (again or self._table.measured(cell) < settings.min_runs)
            and entry.candidate.id not in self._failed
        )

    def _measure(
        self,
        entries: Sequence[_Entry],
        made_by: _Entry | None,
        out: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        start: Any,
        end: Any,
    ) -> None:
        """Compare candidates with exact attention on some queries; nothing waits."""
        settings = cast(RouterSettings, call.settings)
        assert call.sigma is not None
        layer, tokens = str(call.layer), token_class(key.shape[2])
        device = _device_name(query.device)
        made = EXACT if made_by is None else made_by.candidate.id
        if made_by is None or out is not None:
            self._calibration.add_time(Timed(made, layer, tokens, device), start, end)
        seed = settings.quality_seed + _SEED + call.step
        indices = sampled_indices(query.shape[2], settings.calibration_samples, seed, query.device)
        mask = masks.query_rows(call.mask, indices)
        some = query.index_select(2, indices)
        exact = Rows(indices, exact_rows(some, key, value, call.scale, mask)[0])
        for entry in entries:
            theirs = out
            if entry is not made_by:
                theirs = self._tried(entry, query, key, value, call, device, tokens)
            if theirs is not None:
                cell = Cell(entry.candidate.id, layer, sigma_bin(call.sigma), tokens)
                self._calibration.add_error(cell, error_sums(theirs, exact))

    def _tried(
        self,
        entry: _Entry,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        device: str,
        tokens: int,
    ) -> torch.Tensor | None:
        """What a candidate makes of a call that another one answers; None where it can't."""
        if entry.candidate.id in self._failed:
            return None
        start = self._calibration.mark()
        try:
            tried = entry.call(replace(call, log_mass_rows=None))
            out = entry.variant.attend(query, key, value, tried).out
        except Exception:
            # The call itself has been answered: this costs the candidate its chance, no more.
            self._failed.add(entry.candidate.id)
            log.warning(
                "AttnScope router: %s failed and is left out of this run",
                entry.name,
                exc_info=True,
            )
            return None
        if out is not None:
            timed = Timed(entry.candidate.id, str(call.layer), tokens, device)
            self._calibration.add_time(timed, start, self._calibration.mark())
        return out

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        settings: VariantSettings,
        layout: TokenLayout | None = None,
    ) -> float:
        """Those of exact attention, which is the most that a routed call may cost."""
        return exact_flops(query_shape, key_shape)


class _Costs:
    """What calls of one shape cost: measured time, or arithmetic."""

    def __init__(
        self,
        table: Table,
        settings: RouterSettings,
        timed: bool,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> None:
        self._table = table
        self._arithmetic = settings.cost == "flops" or not timed
        self._shapes = query.shape, key.shape
        self._tokens = token_class(key.shape[2])
        self._device = _device_name(query.device)
        self._counted: dict[str, float | None] = {}
        self.unit = "GFLOP" if self._arithmetic else "ms"

    def exact(self, layer: str) -> float | None:
        if self._arithmetic:
            return exact_flops(*self._shapes) / 1e9
        return self._table.ms(Timed(EXACT, layer, self._tokens, self._device))

    def of(self, entry: _Entry, layer: str, layout: TokenLayout | None) -> float | None:
        if not self._arithmetic:
            return self._table.ms(Timed(entry.candidate.id, layer, self._tokens, self._device))
        if entry.name not in self._counted:
            self._counted[entry.name] = self._count(entry, layout)
        return self._counted[entry.name]

    def _count(self, entry: _Entry, layout: TokenLayout | None) -> float | None:
        try:
            return entry.variant.flops(*self._shapes, entry.settings, layout) / 1e9
        except ValueError:
            return None


def _entry(candidate: Candidate, run: RunInfo) -> _Entry:
    settings = candidate.settings
    if getattr(settings, "auto_tune", False):
        # Its search would change what is measured from run to run.
        settings = settings.model_copy(update={"auto_tune": False})
    variant = ATTENDING[candidate.variant]()
    variant.prepare(replace(run, settings=settings, tables=None))
    return _Entry(candidate, variant, settings)


def _told(result: Result, entry: _Entry, chosen: Option, detail: str, budget: Budget) -> Result:
    """A candidate's result with what the router says of it."""
    if result.out is None:
        why = f"{entry.name}: {result.detail}" if result.detail else entry.name
        return replace(result, detail=why)
    stats = dict(result.stats)
    if chosen.predicted is not None:
        stats["predicted_nmse"] = chosen.predicted
        stats["budget_share"] = chosen.predicted / budget.layer
    return replace(
        result, stats=stats, made_by=entry.name, choice=Choice.ROUTER_CHEAPEST, detail=detail
    )


@lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
