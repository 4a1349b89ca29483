"""A run's updates of students on their way into the database, within one transaction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from ..attention.distillation import TRAINING_METRIC_NAMES, StudentEvent
from ..db import steps, students
from ..db.session import dump_json
from ..db.student_models import (
    StudentBatch,
    StudentEventRow,
    StudentLayer,
    StudentReadiness,
    Training,
)
from ..wire import StudentHappened, StudentsUpdated

READINESS = {StudentEvent.READY: True, StudentEvent.NOT_READY: False}
BEGIN_ANEW = frozenset({StudentEvent.CHECKPOINT_LOADED, StudentEvent.RECOVERED})
"""After these a layer may be at an earlier update than before."""


class Readiness:
    """When a layer was ready, out of its updates and of what was said of it.

    Both say the same, in an order that nothing guarantees, so what is about an earlier update than
    the last change changes nothing.
    """

    def __init__(self, run: int, layer: int) -> None:
        self.run = run
        self.layer = layer
        self.ready = False
        self.count = 0
        self.since = 0

    def know(self, row: StudentReadiness) -> None:
        """Take up what is stored."""
        self.ready, self.count, self.since = row.ready, row.number + 1, row.update

    def say(
        self, ready: bool, update: int, step: int | None, at: float
    ) -> StudentReadiness | None:
        """The row of a change; None where nothing changes."""
        if ready == self.ready or update < self.since:
            return None
        row = StudentReadiness(
            run=self.run,
            layer=self.layer,
            number=self.count,
            ready=ready,
            update=update,
            step=step,
            at=at,
        )
        self.know(row)
        return row


class TrainingWriter:
    """Takes a run's updates and events of students in order; rows are written at the end.

    Args:
        run: key of the run's row.
        layer: the number of a layer's name.
    """

    def __init__(self, session: Session, run: int, layer: Callable[[str], int]) -> None:
        self.session = session
        self.run = run
        self.layer = layer
        self.training = students.training(session, run) or self._begin()
        self.layers = {row.layer: row for row in students.layers(session, run)}
        self.ready: dict[int, Readiness] = {}
        for row in students.readiness(session, run):
            self._readiness(row.layer).know(row)
        self.rows: dict[int, list[students.Row]] = {}
        self.others: list[Any] = []

    def _begin(self) -> Training:
        row = Training(run=self.run, updates=0, nonfinite=0)
        self.session.add(row)
        return row

    def _readiness(self, layer: int) -> Readiness:
        return self.ready.setdefault(layer, Readiness(self.run, layer))

    def take_updates(self, event: StudentsUpdated) -> None:
        """Updates since the last such event."""
        updates, training = event.updates, self.training
        count = len(updates.layer)
        nothing: list[float | None] = [None] * count
        columns = [updates.metrics.get(name, nothing) for name in TRAINING_METRIC_NAMES]
        marks, odd = _marks(columns, count)
        numbers = [self.layer(name) for name in updates.layer]
        ready = updates.metrics.get("ready", nothing)
        values = zip(*columns, strict=True)
        for index, metrics in enumerate(values):
            layer, update, step = numbers[index], updates.update[index], updates.step[index]
            at = updates.at[index]
            row = self._layer(layer)
            rows = self.rows.setdefault(layer, [])
            head = (self.run, layer, row.updates, update, step, event.seq, at, marks[index])
            rows.append((*head, *metrics))
            row.updates += 1
            row.nonfinite += odd[index]
            if row.first_update is None:
                row.first_update = update
            row.last_update = update
            row.last_at = at
            said = ready[index]
            if said is not None and said == said:
                self._say(layer, said > 0.5, update, step, at)
        training.updates += count
        training.nonfinite += sum(odd)
        if count:
            begun, ended = training.first_at, training.last_at
            training.first_at = min(updates.at if begun is None else [begun, *updates.at])
            training.last_at = max(updates.at if ended is None else [ended, *updates.at])
        for held in reversed(updates.metrics.get("replay_bytes", [])):
            if held is not None and math.isfinite(held):
                training.replay_bytes = held
                break
        if event.replay_limit_bytes is not None:
            training.replay_limit_bytes = event.replay_limit_bytes
        self.others.append(
            StudentBatch(
                run=self.run,
                seq=event.seq,
                at=event.at,
                count=count,
                replay_limit_bytes=event.replay_limit_bytes,
            )
        )

    def take_event(self, event: StudentHappened) -> None:
        """Something else that happened to students."""
        layer = None if event.layer is None else self.layer(event.layer)
        if event.event in BEGIN_ANEW:
            for number, known in self.ready.items():
                if layer is None or number == layer:
                    known.since = 0
        if layer is not None and event.event in READINESS:
            known_row = self.layers.get(layer)
            update = event.update
            if update is None:
                update = (known_row.last_update if known_row else None) or 0
            self._say(layer, READINESS[event.event], update, event.step, event.at)
        self.others.append(
            StudentEventRow(
                run=self.run,
                seq=event.seq,
                at=event.at,
                event=event.event.value,
                layer=layer,
                update=event.update,
                step=event.step,
                detail=event.detail,
            )
        )

    def _say(self, layer: int, ready: bool, update: int, step: int | None, at: float) -> None:
        row = self._readiness(layer).say(ready, update, step, at)
        if row is not None:
            self.others.append(row)

    def _layer(self, layer: int) -> StudentLayer:
        row = self.layers.get(layer)
        if row is None:
            row = StudentLayer(
                run=self.run, layer=layer, updates=0, packed=0, nonfinite=0, latest={}
            )
            self.layers[layer] = row
            self.session.add(row)
        return row

    def store(self) -> None:
        """Write what was taken."""
        self.session.add_all(self.others)
        for layer, rows in self.rows.items():
            row = self.layers[layer]
            row.latest = {**row.latest, **_latest(rows)}
            kept = students.pack(self.session, row, rows)
            steps.insert_rows(self.session, "student_updates", kept)
        self.session.flush()


def _marks(columns: list[list[float | None]], count: int) -> tuple[list[str | None], list[int]]:
    """Per update the names of the metrics that are NaN, or None, and how many aren't finite."""
    marks: list[str | None] = [None] * count
    odd = [0] * count
    for name, column in zip(TRAINING_METRIC_NAMES, columns, strict=True):
        for index, value in enumerate(column):
            # only what isn't finite has a difference to itself; this runs for every number
            if value is not None and value - value != 0.0:
                odd[index] += 1
                if value != value:
                    marks[index] = name if marks[index] is None else f"{marks[index]},{name}"
    return marks, odd


def _latest(rows: list[students.Row]) -> dict[str, Any]:
    """The newest measured value of each metric, NaN and infinities as strings."""
    found: dict[str, Any] = {}
    for place, name in enumerate(TRAINING_METRIC_NAMES, start=students.FIRST_METRIC):
        value = next((row[place] for row in reversed(rows) if row[place] is not None), None)
        if value is not None:
            found[name] = value if math.isfinite(value) else dump_json(value).strip('"')
    return found
