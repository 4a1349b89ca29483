"""Steps, what the layers did in them, and why calls ran exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from ..attention.metrics import METRIC_NAMES
from . import models, student_models

LAYER_STEP_COLUMNS: tuple[str, ...] = (*models.LAYER_STEP_FIELDS, *METRIC_NAMES)
STEP_COLUMNS: tuple[str, ...] = tuple(column.name for column in models.Step.__table__.columns)
REASON_COLUMNS: tuple[str, ...] = tuple(column.name for column in models.Reason.__table__.columns)

_TABLES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "steps": (models.Step.__table__, STEP_COLUMNS),
    "layer_steps": (models.layer_steps, LAYER_STEP_COLUMNS),
    "reasons": (models.Reason.__table__, REASON_COLUMNS),
    "student_updates": (student_models.student_updates, student_models.STUDENT_UPDATE_COLUMNS),
}
_compiled: dict[tuple[str, str], str | None] = {}


def known(session: Session, run: int, steps: Collection[int]) -> set[int]:
    """Which of these steps of a run are stored."""
    query = select(models.Step.step).where(models.Step.run == run, models.Step.step.in_(steps))
    return set(session.scalars(query))


def insert_rows(session: Session, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Write many rows at once.

    Args:
        table: ``steps``, ``layer_steps``, ``reasons`` or ``student_updates``.
        rows: tuples in the order of the table's ``*_COLUMNS``.
    """
    if not rows:
        return
    connection = session.connection()
    target, names = _TABLES[table]
    key = (connection.dialect.name, table)
    if key not in _compiled:
        statement = insert(target).compile(dialect=connection.dialect, column_keys=list(names))
        # only a positional statement takes tuples, in the order that it names
        fits = statement.positional and list(statement.positiontup or ()) == list(names)
        _compiled[key] = str(statement) if fits else None
    sql = _compiled[key]
    if sql is not None:
        connection.exec_driver_sql(sql, list(rows))
    else:
        connection.execute(insert(target), [dict(zip(names, row, strict=True)) for row in rows])


def of_run(
    session: Session, run: int, first: int | None = None, last: int | None = None
) -> Sequence[models.Step]:
    """A run's steps in order, from the first to the last one wanted."""
    query = select(models.Step).where(models.Step.run == run)
    if first is not None:
        query = query.where(models.Step.step >= first)
    if last is not None:
        query = query.where(models.Step.step <= last)
    return session.scalars(query.order_by(models.Step.step)).all()


def layer_rows(
    session: Session,
    run: int,
    first: int | None = None,
    last: int | None = None,
    layers: Collection[int] | None = None,
) -> Sequence[Sequence[Any]]:
    """Rows of ``layer_steps`` in the order of step and layer; `LAYER_STEP_COLUMNS` of each."""
    table = models.layer_steps
    query = select(*(table.c[name] for name in LAYER_STEP_COLUMNS)).where(table.c.run == run)
    if first is not None:
        query = query.where(table.c.step >= first)
    if last is not None:
        query = query.where(table.c.step <= last)
    if layers is not None:
        query = query.where(table.c.layer.in_(layers))
    rows: Sequence[Any] = session.execute(query.order_by(table.c.step, table.c.layer)).all()
    return rows


def reasons(
    session: Session, run: int, first: int | None = None, last: int | None = None
) -> Sequence[models.Reason]:
    """Gates, fallbacks and choices of a run in the order of step and layer."""
    query = select(models.Reason).where(models.Reason.run == run)
    if first is not None:
        query = query.where(models.Reason.step >= first)
    if last is not None:
        query = query.where(models.Reason.step <= last)
    order = (models.Reason.step, models.Reason.layer, models.Reason.kind, models.Reason.reason)
    return session.scalars(query.order_by(*order)).all()


def reason_sums(session: Session, run: int) -> Sequence[tuple[int, str, str, int]]:
    """Calls per step, kind and reason, over the layers."""
    key = (models.Reason.step, models.Reason.kind, models.Reason.reason)
    query = select(*key, func.sum(models.Reason.count)).where(models.Reason.run == run)
    return [(row[0], row[1], row[2], int(row[3])) for row in session.execute(query.group_by(*key))]


def longest_key(session: Session, run: int) -> int | None:
    """Most key tokens of any attention call; None where no step has closed."""
    table = models.layer_steps
    query = select(func.max(table.c.tokens_k)).where(table.c.run == run)
    longest: int | None = session.scalar(query)
    return longest


def find(session: Session, run: int, step: int) -> models.Step | None:
    """One step of a run."""
    return session.get(models.Step, (run, step))


def as_tuple(names: Sequence[str], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Values in the order of the names."""
    return tuple(values[name] for name in names)
