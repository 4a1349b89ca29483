"""A run's training as the API shows it: what it comes to, and windows into its long series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from sqlalchemy.orm import Session

from ..attention.distillation import TRAINING_METRICS
from ..attention.metrics import Metric
from ..db import changes, models, revisions, runs, students
from ..db.student_models import StudentEventRow, StudentLayer, StudentReadiness
from . import downsampling, problems
from .schemas import FieldProblem
from .training_schemas import (
    Distillation,
    ReadyInterval,
    RevisionMark,
    StudentEventItem,
    StudentEvents,
    StudentLayerState,
    TrainingTotals,
)

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in TRAINING_METRICS}
Found = dict[int, students.Series]

RECENT_BATCHES = 33
"""Updates per second are those of the newest so many events, and of them the last minute."""
RECENT_SECONDS = 60.0
LEAST_POINTS, MOST_POINTS = 2, 4000
MOST_CELLS = 1_000_000
"""Buckets of an answer, over all layers."""


def totals(session: Session, run: models.Run) -> TrainingTotals:
    """What a run's training comes to so far."""
    row = students.training(session, run.id)
    states = _last_states(students.readiness(session, run.id))
    return TrainingTotals(
        run_id=run.run_id,
        updates=row.updates if row else 0,
        updates_per_second=_rate(session, run.id),
        first_at=row.first_at if row else None,
        last_at=row.last_at if row else None,
        ready=sum(states.values()),
        nonfinite=row.nonfinite if row else 0,
        replay_bytes=row.replay_bytes if row else None,
        replay_limit_bytes=row.replay_limit_bytes if row else None,
        events=students.event_counts(session, run.id),
    )


def _rate(session: Session, run: int) -> float | None:
    newest = students.newest_batches(session, run, RECENT_BATCHES)
    if len(newest) < 2:
        return None
    recent = [item for item in newest if item.at >= newest[0].at - RECENT_SECONDS]
    if len(recent) < 2:
        recent = list(newest[:2])
    seconds = recent[0].at - recent[-1].at
    made = sum(item.count for item in recent[:-1])
    return made / seconds if seconds > 0 else None


def _last_states(rows: Sequence[StudentReadiness]) -> dict[int, bool]:
    return {row.layer: row.ready for row in rows}


def summary(session: Session, run: models.Run) -> Distillation:
    """A run's training, layer by layer, and the feed position that the answer includes."""
    seq = changes.latest_seq(session)
    names = runs.layer_names(session, run.id)
    changed: dict[int, list[StudentReadiness]] = {}
    for row in students.readiness(session, run.id):
        changed.setdefault(row.layer, []).append(row)
    known = {row.layer: row for row in students.layers(session, run.id)}
    layers = [
        _layer(names[number], known.get(number), changed.get(number, []))
        for number in sorted(known.keys() | changed.keys())
    ]
    return Distillation(
        seq=seq,
        totals=totals(session, run),
        layers=layers,
        marks=_marks(session, run, list(known.values())),
    )


def _marks(
    session: Session, run: models.Run, layers: Sequence[StudentLayer]
) -> list[RevisionMark]:
    applied = [
        (row.number, row.applied_step)
        for row in revisions.of_run(session, run.id)
        if row.number > 0 and row.applied_step is not None
    ]
    if not applied or not layers:
        return []
    longest = max(layers, key=lambda row: row.updates)
    updates = students.first_updates(session, longest, [step for _, step in applied])
    return [
        RevisionMark(revision=number, step=step, update=update)
        for (number, step), update in zip(applied, updates, strict=True)
        if update is not None
    ]


def _layer(
    name: str, row: StudentLayer | None, changed: Sequence[StudentReadiness]
) -> StudentLayerState:
    return StudentLayerState(
        layer=name,
        updates=row.updates if row else 0,
        first_update=row.first_update if row else None,
        last_update=row.last_update if row else None,
        last_at=row.last_at if row else None,
        nonfinite=row.nonfinite if row else 0,
        ready=bool(changed and changed[-1].ready),
        intervals=_intervals(changed),
        latest=row.latest if row else {},
    )


def _intervals(changed: Sequence[StudentReadiness]) -> list[ReadyInterval]:
    found: list[ReadyInterval] = []
    for row in changed:
        if row.ready:
            found.append(
                ReadyInterval(
                    from_update=row.update,
                    from_step=row.step,
                    from_at=row.at,
                    to_update=None,
                    to_step=None,
                    to_at=None,
                )
            )
        elif found:
            found[-1] = found[-1].model_copy(
                update={"to_update": row.update, "to_step": row.step, "to_at": row.at}
            )
    return found


def events(session: Session, run: models.Run, after: int, limit: int) -> StudentEvents:
    """What else happened to students, oldest first."""
    names = runs.layer_names(session, run.id)
    rows = students.events(session, run.id, after, limit + 1)
    items = [_event(row, names) for row in rows[:limit]]
    return StudentEvents(items=items, more=len(rows) > limit)


def _event(row: StudentEventRow, names: Sequence[str]) -> StudentEventItem:
    return StudentEventItem(
        seq=row.seq,
        at=row.at,
        event=row.event,
        layer=None if row.layer is None else names[row.layer],
        update=row.update,
        step=row.step,
        detail=row.detail,
    )


def metric_of(name: str) -> Metric:
    """A training metric.

    Raises:
        ProblemError: there is none of that name (422).
    """
    if name not in BY_NAME:
        allowed = "one of " + ", ".join(BY_NAME)
        raise problems.invalid([FieldProblem(field="metric", value=name, allowed=allowed)])
    return BY_NAME[name]


def window(
    session: Session,
    run: models.Run,
    metric: Metric,
    parts: Sequence[str],
    *,
    layers: Sequence[str] = (),
    first: int | None = None,
    last: int | None = None,
    points: int = 1000,
    width: int | None = None,
) -> dict[str, Any]:
    """A metric's series between two update numbers, in buckets. `TrainingWindow`.

    Args:
        parts: of ``heatmap``, ``bands`` and ``lines``.
        layers: which; all that were trained where empty.
        first: least update number; the run's first where None.
        last: greatest one; the run's last where None.
        points: most buckets.
        width: of a bucket, instead of ``points``: a power of two.

    Raises:
        ProblemError: the window is none, or holds too many buckets (422); no such layer (404).
    """
    seq = changes.latest_seq(session)
    names = runs.layer_names(session, run.id)
    known = {row.layer: row for row in students.layers(session, run.id)}
    for name in layers:
        if name not in names:
            raise problems.not_found("layer", name)
    rows = [names.index(name) for name in layers] if layers else sorted(known)
    begin, end = _span([known[row] for row in rows if row in known])
    total = sum(known[row].updates for row in rows if row in known)
    first = begin if first is None else max(first, begin)
    last = end if last is None else min(last, end)
    shown_layers = [names[row] for row in rows]
    head: dict[str, Any] = {
        "run_id": run.run_id,
        "seq": seq,
        "metric": metric.name,
        "first_update": begin,
        "last_update": end,
        "layers": shown_layers,
        "updates": total,
    }
    if not known or last < first:
        empty = {"width": width or 1, "start": [], "counts": [], "nonfinite": []}
        return {**head, **empty, **_parts(parts)}
    step = width or downsampling.width_for(first, last, points)
    count = last // step - first // step + 1
    if count * max(1, len(rows)) > MOST_CELLS:
        raise problems.invalid(
            [
                FieldProblem(
                    field="width" if width else "points",
                    value=width or points,
                    allowed=f"at most {MOST_CELLS} buckets over all layers; these are "
                    f"{count} for each of {len(rows)} layers",
                )
            ]
        )
    # whole buckets, or the ones at the edges would say less than they hold
    chosen = rows if layers else None

    def read(size: int) -> Found:
        low, high = first // size * size, (last // size + 1) * size - 1
        return students.series(session, run.id, metric.name, chosen, low, high)

    found = read(step)
    sparse = 1 if width else downsampling.width_of_stride(one for one, _ in found.values())
    if sparse > step:
        step = sparse
        found = read(step)
    made = downsampling.buckets(found, rows, first, last, step)
    odd = [
        [int(row), int(column), int(made.nonfinite[row, column])]
        for row, column in zip(*np.nonzero(made.nonfinite), strict=True)
    ]
    return {
        **head,
        "width": step,
        "start": made.start,
        "counts": made.counts,
        "nonfinite": odd,
        **_parts(parts, made, metric),
    }


def _span(rows: Sequence[StudentLayer]) -> tuple[int, int]:
    first = [row.first_update for row in rows if row.first_update is not None]
    last = [row.last_update for row in rows if row.last_update is not None]
    return (min(first), max(last)) if first and last else (1, 0)


def _parts(
    parts: Sequence[str], made: downsampling.Buckets | None = None, metric: Metric | None = None
) -> dict[str, Any]:
    if made is None or metric is None:
        return {"heatmap": None, "bands": None, "lines": None}
    answer: dict[str, Any] = {"heatmap": None, "bands": None, "lines": None}
    if "heatmap" in parts:
        answer["heatmap"] = _short(downsampling.worst(made, metric))
    if "bands" in parts:
        spread = downsampling.bands(made)
        low, middle, high = spread.quantiles
        answer["bands"] = {
            "p10": _short(low),
            "p50": _short(middle),
            "p90": _short(high),
            "low": _short(spread.low),
            "high": _short(spread.high),
            "layers": spread.layers,
        }
    if "lines" in parts:
        answer["lines"] = {
            name: _short(getattr(made, name)) for name in ("low", "high", "first", "last")
        }
    return answer


def _short(values: downsampling.Floats) -> Any:
    """As float32, in which the numbers are stored and which JSON spells with fewer digits."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def as_json(answer: dict[str, Any]) -> bytes:
    """A window as JSON; NaN, which here is "no value", as null."""
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
