"""Updates of students, their readiness, and what else happened to them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from ..attention.distillation import TRAINING_METRIC_NAMES
from . import numbers, student_blocks
from .student_blocks import BLOCK, Column, Floats, Ints, Updates
from .student_models import (
    STUDENT_UPDATE_COLUMNS,
    STUDENT_UPDATE_FIELDS,
    StudentBatch,
    StudentBlock,
    StudentEventRow,
    StudentLayer,
    StudentReadiness,
    Training,
    student_updates,
)

FIRST_METRIC = len(STUDENT_UPDATE_FIELDS)
PLACE = STUDENT_UPDATE_FIELDS.index("place")
UPDATE = STUDENT_UPDATE_FIELDS.index("update")
NAN_METRICS = STUDENT_UPDATE_FIELDS.index("nan_metrics")

Row = tuple[Any, ...]
"""A row of ``student_updates``; `STUDENT_UPDATE_COLUMNS` of it."""
Series = tuple[Ints, Floats]
"""Update numbers and a metric's values, those that were measured alone."""


def training(session: Session, run: int) -> Training | None:
    """A run's training as a whole; None where it has none."""
    return session.get(Training, run)


def layers(session: Session, run: int) -> Sequence[StudentLayer]:
    """The layers that a run has trained, by their number."""
    query = select(StudentLayer).where(StudentLayer.run == run).order_by(StudentLayer.layer)
    return session.scalars(query).all()


def readiness(session: Session, run: int) -> Sequence[StudentReadiness]:
    """Every change of readiness in a run, layer by layer, oldest first."""
    query = select(StudentReadiness).where(StudentReadiness.run == run)
    order = (StudentReadiness.layer, StudentReadiness.number)
    return session.scalars(query.order_by(*order)).all()


def newest_batches(session: Session, run: int, limit: int) -> Sequence[StudentBatch]:
    """The last events of updates, newest first."""
    query = select(StudentBatch).where(StudentBatch.run == run)
    return session.scalars(query.order_by(StudentBatch.seq.desc()).limit(limit)).all()


def events(
    session: Session, run: int, after: int = -1, limit: int | None = None
) -> Sequence[StudentEventRow]:
    """What else happened, oldest first, from behind a ``seq``."""
    query = select(StudentEventRow).where(StudentEventRow.run == run, StudentEventRow.seq > after)
    query = query.order_by(StudentEventRow.seq)
    return session.scalars(query if limit is None else query.limit(limit)).all()


def event_counts(session: Session, run: int) -> dict[str, int]:
    """How often each kind of event happened."""
    query = select(StudentEventRow.event, func.count()).where(StudentEventRow.run == run)
    return {name: count for name, count in session.execute(query.group_by(StudentEventRow.event))}


def tail(session: Session, run: int, layer: int) -> list[Row]:
    """A layer's updates that are not packed yet."""
    table = student_updates
    query = select(*(table.c[name] for name in STUDENT_UPDATE_COLUMNS)).where(
        table.c.run == run, table.c.layer == layer
    )
    return [_whole_row(row) for row in session.execute(query.order_by(table.c.place))]


def _whole_row(row: Sequence[Any]) -> Row:
    values = numbers.with_nan(row[FIRST_METRIC:], TRAINING_METRIC_NAMES, row[NAN_METRICS])
    return (*row[:FIRST_METRIC], *values)


def updates_of(rows: Sequence[Row]) -> Updates:
    """Rows of one layer as columns."""
    columns = dict(zip(STUDENT_UPDATE_COLUMNS, zip(*rows, strict=True), strict=True))
    return Updates(
        {name: np.array(columns[name], np.int64) for name in student_blocks.WHOLE},
        np.array(columns[student_blocks.TIME], np.float64),
        {name: student_blocks.of_metric(columns[name]) for name in TRAINING_METRIC_NAMES},
    )


def pack(session: Session, row: StudentLayer, new: Sequence[Row]) -> Sequence[Row]:
    """Pack a layer's updates as far as they fill blocks.

    Args:
        row: the layer; ``packed`` goes up.
        new: its updates that are not in the database yet.

    Returns:
        Those that are to be rows of ``student_updates``.
    """
    if row.updates - row.packed < BLOCK:
        return new
    run, layer = row.run, row.layer
    waiting = [*tail(session, run, layer), *new]
    full = len(waiting) // BLOCK * BLOCK
    made = updates_of(waiting[:full])
    blocks: list[dict[str, Any]] = []
    for start in range(0, full, BLOCK):
        part = made.cut(start, start + BLOCK)
        about: dict[str, Any] = {
            "run": run,
            "layer": layer,
            "block": (row.packed + start) // BLOCK,
            "count": BLOCK,
            "first_update": int(part.whole["update"].min()),
            "last_update": int(part.whole["update"].max()),
        }
        blocks.extend({**about, "name": name, "data": d} for name, d in part.packed().items())
    session.execute(insert(StudentBlock), blocks)
    table = student_updates
    session.execute(delete(table).where(table.c.run == run, table.c.layer == layer))
    row.packed += full
    return waiting[full:]


def series(
    session: Session,
    run: int,
    metric: str,
    layers: Collection[int] | None = None,
    first: int | None = None,
    last: int | None = None,
) -> dict[int, Series]:
    """A metric's measured values, by layer, in the order in which they came.

    Args:
        metric: name of a training metric.
        layers: which; all where None.
        first: least update number wanted; any where None.
        last: greatest one wanted.
    """
    parts: dict[int, list[Series]] = {}
    for layer, updates, column in _parts(session, run, metric, layers, first, last):
        wanted = column.measured
        if first is not None and updates.size and int(updates.min()) < first:
            wanted = wanted & (updates >= first)
        if last is not None and updates.size and int(updates.max()) > last:
            wanted = wanted & (updates <= last)
        found = (
            (updates, column.values)
            if wanted.all()
            else (
                updates[wanted],
                column.values[wanted],
            )
        )
        parts.setdefault(layer, []).append(found)
    return {
        layer: (
            np.concatenate([updates for updates, _ in of_layer]),
            np.concatenate([values for _, values in of_layer]),
        )
        for layer, of_layer in sorted(parts.items())
    }


def _parts(
    session: Session,
    run: int,
    metric: str,
    layers: Collection[int] | None,
    first: int | None,
    last: int | None,
) -> Iterator[tuple[int, Ints, Column]]:
    odd = _odd_numbers(session, run)
    block = StudentBlock
    query = select(block.layer, block.block, block.count, block.first_update, block.data).where(
        block.run == run, block.name == metric
    )
    if layers is not None:
        query = query.where(block.layer.in_(layers))
    if first is not None:
        query = query.where(block.last_update >= first)
    if last is not None:
        query = query.where(block.first_update <= last)
    for layer, number, count, begin, data in session.execute(
        query.order_by(block.layer, block.block)
    ):
        updates = odd.get((layer, number))
        if updates is None:
            updates = np.arange(begin, begin + count, dtype=np.int64)
        yield layer, updates, student_blocks.unpack_metric(data, count)
    yield from _tail_parts(session, run, metric, layers, first, last)


def _odd_numbers(session: Session, run: int) -> dict[tuple[int, int], Ints]:
    """Update numbers of the blocks in which they don't go up by one."""
    query = select(StudentBlock.layer, StudentBlock.block, StudentBlock.data).where(
        StudentBlock.run == run, StudentBlock.name == "update"
    )
    return {
        (layer, block): student_blocks.unpack_whole(data)
        for layer, block, data in session.execute(query)
    }


def _tail_parts(
    session: Session,
    run: int,
    metric: str,
    layers: Collection[int] | None,
    first: int | None,
    last: int | None,
) -> Iterator[tuple[int, Ints, Column]]:
    table = student_updates
    query = select(table.c.layer, table.c.update, table.c[metric], table.c.nan_metrics).where(
        table.c.run == run
    )
    if layers is not None:
        query = query.where(table.c.layer.in_(layers))
    if first is not None:
        query = query.where(table.c.update >= first)
    if last is not None:
        query = query.where(table.c.update <= last)
    rows = session.execute(query.order_by(table.c.layer, table.c.place)).all()
    if not rows:
        return
    numbers_, updates, values, marks = zip(*rows, strict=True)
    given = [
        float("nan") if mark and value is None and metric in mark.split(",") else value
        for value, mark in zip(values, marks, strict=True)
    ]
    column = student_blocks.of_metric(given)
    of_layer, of_update = np.array(numbers_, np.int64), np.array(updates, np.int64)
    edges = np.flatnonzero(np.diff(of_layer)) + 1
    for start, stop in zip([0, *edges], [*edges, len(rows)], strict=True):
        part = Column(column.values[start:stop], column.measured[start:stop])
        yield int(of_layer[start]), of_update[start:stop], part


def first_updates(session: Session, row: StudentLayer, steps: Sequence[int]) -> list[int | None]:
    """The number of a layer's first update at or after each step; None where there is none."""
    block = StudentBlock
    query = select(block.name, block.block, block.first_update, block.count, block.data).where(
        block.run == row.run, block.layer == row.layer, block.name.in_(("step", "update"))
    )
    columns: dict[tuple[int, str], Ints] = {}
    for name, number, first, count, data in session.execute(query.order_by(block.block)):
        columns[number, name] = student_blocks.unpack_whole(data)
        if name == "step":
            columns.setdefault((number, "update"), np.arange(first, first + count, dtype=np.int64))
    table = student_updates
    newest = select(table.c.step, table.c.update).where(
        table.c.run == row.run, table.c.layer == row.layer
    )
    pairs = session.execute(newest.order_by(table.c.place)).all()
    blocks = sorted({number for number, _ in columns})
    at_step = np.concatenate(
        [*(columns[n, "step"] for n in blocks), np.array([p[0] for p in pairs], np.int64)]
    )
    update = np.concatenate(
        [*(columns[n, "update"] for n in blocks), np.array([p[1] for p in pairs], np.int64)]
    )
    places = np.searchsorted(at_step, np.array(steps, np.int64))
    return [int(update[place]) if place < len(update) else None for place in places]


def batches(session: Session, run: int) -> Sequence[StudentBatch]:
    """The events of updates, oldest first."""
    query = select(StudentBatch).where(StudentBatch.run == run)
    return session.scalars(query.order_by(StudentBatch.seq)).all()


def of_layer(session: Session, row: StudentLayer) -> Iterator[Updates]:
    """All updates of a layer, a block at a time, oldest first."""
    block = StudentBlock
    for number in range(-(-row.packed // BLOCK)):
        query = select(block.name, block.count, block.first_update, block.data).where(
            block.run == row.run,
            block.layer == row.layer,
            block.block == number,
            block.name.in_(student_blocks.COLUMNS),
        )
        found = session.execute(query).all()
        columns: Mapping[str, bytes] = {name: data for name, _, _, data in found}
        _, count, first_update, _ = found[0]
        yield student_blocks.unpacked(columns, count, first_update)
    rest = tail(session, row.run, row.layer)
    if rest:
        yield updates_of(rest)
