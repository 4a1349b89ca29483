"""What was measured of candidates: errors and times, of runs, by layer and sigma range.

A run leaves one row of errors in each cell that it measured: the largest NMSE of the layer at a
call in the cell, and the largest of each group of heads. A run is what a new prompt is compared
with, so steps of one run don't count as several.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .bound import LEAST, MOST, clamped, upper_bound

KEPT_ERRORS = 40
"""Newest runs of a cell: enough for an order statistic that isn't the largest."""

KEPT_TIMES = 15

EXACT = "exact"
"""Stands for exact attention among the times."""


class Cell(NamedTuple):
    """Calls whose errors belong together."""

    candidate: str
    layer: str
    sigma_bin: int
    token_class: int


class Timed(NamedTuple):
    """Calls whose times belong together."""

    what: str
    layer: str
    token_class: int
    device: str


class Prediction(NamedTuple):
    """What a candidate's error stays below at a call of another run.

    Attributes:
        layer: NMSE of the layer.
        group: the largest over its groups of heads.
    """

    layer: float
    group: float


@dataclass
class Scores:
    """What one run has measured so far.

    Attributes:
        errors: a row for each cell: NMSE of the layer, then of each group of heads.
        times: milliseconds of calls.
        candidates: what each candidate's id stands for.
    """

    errors: dict[Cell, list[float]] = field(default_factory=dict)
    times: dict[Timed, list[float]] = field(default_factory=dict)
    candidates: dict[str, str] = field(default_factory=dict)

    def add_error(self, cell: Cell, row: Iterable[float]) -> None:
        """Keep the largest errors of the run's calls in a cell."""
        new = [clamped(value) for value in row]
        known = self.errors.get(cell)
        if known is not None and len(known) == len(new):
            new = [max(pair) for pair in zip(known, new)]  # noqa: B905
        self.errors[cell] = new

    def add_time(self, timed: Timed, ms: float) -> None:
        """Keep a call's time."""
        self.times.setdefault(timed, []).append(ms)


@dataclass(frozen=True)
class Table:
    """Measurements of earlier runs. It never changes; `with_run` gives another one.

    Attributes:
        errors: rows of a cell, one for each run, the newest last.
        times: medians of runs in milliseconds, the newest last.
        candidates: what each candidate's id stands for.
        runs: that have left something here.
    """

    errors: Mapping[Cell, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    times: Mapping[Timed, tuple[float, ...]] = field(default_factory=dict)
    candidates: Mapping[str, str] = field(default_factory=dict)
    runs: int = 0

    def measured(self, cell: Cell) -> int:
        """Runs that have measured a cell; the newest `KEPT_ERRORS` count."""
        return len(self.errors.get(cell, ()))

    def predicted(self, cell: Cell) -> Prediction | None:
        """The bounds of a cell; None where fewer than two runs have measured it.

        Errors of groups were added up to the layer's within each run, weighted by the energy of
        their outputs, before the layer's bound is taken over runs: bounds of groups added up
        would hold too and be far above it, since different groups are at their worst in
        different runs.
        """
        rows = self.errors.get(cell, ())
        bounds = [upper_bound(column) for column in zip(*rows)]  # noqa: B905
        if not bounds or bounds[0] is None:
            return None
        known = [bound for bound in bounds if bound is not None]
        return Prediction(known[0], max(known[1:], default=known[0]))

    def ms(self, timed: Timed) -> float | None:
        """Time of a call; None where it wasn't measured."""
        found = self.times.get(timed)
        return statistics.median(found) if found else None

    def with_run(self, scores: Scores) -> Table:
        """With what a run has measured."""
        if not scores.errors and not scores.times:
            return self
        errors = dict(self.errors)
        for cell, row in scores.errors.items():
            earlier = errors.get(cell, ())
            if earlier and len(earlier[0]) != len(row):
                # Another number of heads: another model under the same name.
                earlier = ()
            errors[cell] = (*earlier, tuple(row))[-KEPT_ERRORS:]
        times = dict(self.times)
        for timed, values in scores.times.items():
            middle = statistics.median(values)
            times[timed] = (*times.get(timed, ()), middle)[-KEPT_TIMES:]
        candidates = {**self.candidates, **scores.candidates}
        return Table(errors, times, candidates, self.runs + 1)

    def merged(self, other: Table) -> Table:
        """Both tables' measurements; those of ``other`` count as the newer ones."""
        errors = dict(self.errors)
        for cell, rows in other.errors.items():
            earlier = errors.get(cell, ())
            if earlier and len(earlier[0]) != len(rows[0]):
                earlier = ()
            errors[cell] = (*earlier, *rows)[-KEPT_ERRORS:]
        times = dict(self.times)
        for timed, values in other.times.items():
            times[timed] = (*times.get(timed, ()), *values)[-KEPT_TIMES:]
        candidates = {**self.candidates, **other.candidates}
        return Table(errors, times, candidates, self.runs + other.runs)


class TableStore(Protocol):
    """Where a router's table lies."""

    def load(self) -> Table:
        """What earlier runs have measured."""

    def add(self, scores: Scores) -> None:
        """Take what a run has measured. Nothing is written in the caller's thread."""


class TableError(ValueError):
    """A table that can't be read; the message names the field, its value and what is allowed."""


class _Errors(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    candidate: str
    layer: str
    sigma_bin: int
    token_class: int
    runs: list[list[float]] = Field(max_length=KEPT_ERRORS)


class _Times(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    what: str
    layer: str
    token_class: int
    device: str
    runs_ms: list[float] = Field(max_length=KEPT_TIMES)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    format: Literal["attnscope-router-table"] = "attnscope-router-table"
    version: Literal[1] = 1
    model: str = ""
    runs: int = Field(0, ge=0)
    candidates: dict[str, str] = Field(default_factory=dict)
    errors: list[_Errors] = Field(default_factory=list)
    times: list[_Times] = Field(default_factory=list)


def to_json(table: Table, model: str) -> str:
    """A table as the text of a file."""
    return _File(
        model=model,
        runs=table.runs,
        candidates=dict(table.candidates),
        errors=[
            _Errors(**cell._asdict(), runs=[[float(f"{x:.4g}") for x in row] for row in rows])
            for cell, rows in sorted(table.errors.items())
        ],
        times=[
            _Times(**timed._asdict(), runs_ms=[float(f"{x:.4g}") for x in values])
            for timed, values in sorted(table.times.items())
        ],
    ).model_dump_json()


def from_json(text: str, model: str = "") -> Table:
    """The table of a file's text.

    Args:
        text: as `to_json` writes it.
        model: whose table it has to be; empty for any.

    Raises:
        TableError: it is no such table, or another model's.
    """
    try:
        read = _File.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        shown = repr(first["input"])[:80]
        raise TableError(f"{place}: is {shown}; {first['msg']}") from None
    if model and read.model != model:
        raise TableError(f"model: is {read.model!r}; allowed: {model!r}, which is sampled")
    errors: dict[Cell, tuple[tuple[float, ...], ...]] = {}
    for index, item in enumerate(read.errors):
        _check_rows(f"errors.{index}.runs", item.runs)
        cell = Cell(item.candidate, item.layer, item.sigma_bin, item.token_class)
        errors[cell] = tuple(tuple(row) for row in item.runs)
    times: dict[Timed, tuple[float, ...]] = {}
    for index, timed in enumerate(read.times):
        if not timed.runs_ms or min(timed.runs_ms) < 0.0:
            raise TableError(f"times.{index}.runs_ms: allowed: at least one, none below 0")
        key = Timed(timed.what, timed.layer, timed.token_class, timed.device)
        times[key] = tuple(timed.runs_ms)
    return Table(errors, times, read.candidates, read.runs)


def _check_rows(place: str, rows: list[list[float]]) -> None:
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise TableError(f"{place}: allowed: at least one run, all with as many errors")
    for row in rows:
        for value in row:
            if not LEAST <= value <= MOST:
                raise TableError(f"{place}: holds {value!r}; allowed: {LEAST:g} to {MOST:g}")
