"""The change feed: one sequence over everything that is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from . import models

Kind = Literal["instance", "run", "step", "revision", "image", "training", "run_deleted"]

CHANGE_COUNTER = "change"
MESSAGE_COUNTER = "message"
SUPERSEDING: frozenset[str] = frozenset({"instance", "run", "revision", "training"})
"""Kinds whose newer item makes the older one about the same thing needless."""


class Pending(NamedTuple):
    """A change that gets its number when its transaction ends."""

    kind: Kind
    run_id: str | None
    reference: str


def latest_seq(session: Session) -> int:
    """The newest change's number; 0 when there is none."""
    query = select(models.Counter.value).where(models.Counter.name == CHANGE_COUNTER)
    return session.scalar(query) or 0


def take_numbers(session: Session, counter: str, count: int = 1) -> int:
    """Take the next numbers of a counter; they are never given again.

    Returns:
        The first of them.
    """
    query = (
        update(models.Counter)
        .where(models.Counter.name == counter)
        .values(value=models.Counter.value + count)
    )
    if session.connection().execute(query).rowcount == 0:
        session.execute(insert(models.Counter).values(name=counter, value=count))
        return 1
    last = session.scalar(select(models.Counter.value).where(models.Counter.name == counter))
    assert last is not None
    return last - count + 1


def append(session: Session, items: Sequence[Pending]) -> int:
    """Write changes, in order.

    Returns:
        The number of the last one.
    """
    first = take_numbers(session, CHANGE_COUNTER, len(items))
    for item in items:
        if item.kind in SUPERSEDING:
            session.execute(
                delete(models.Change).where(
                    models.Change.run_id.is_(None)
                    if item.run_id is None
                    else models.Change.run_id == item.run_id,
                    models.Change.kind == item.kind,
                    models.Change.reference == item.reference,
                )
            )
    rows = [
        {"seq": first + index, "kind": i.kind, "run_id": i.run_id, "reference": i.reference}
        for index, i in enumerate(items)
    ]
    session.execute(insert(models.Change), rows)
    return first + len(items) - 1


def after(
    session: Session, seq: int, limit: int, run_id: str | None = None
) -> Sequence[models.Change]:
    """Changes after a number, oldest first."""
    query = select(models.Change).where(models.Change.seq > seq)
    if run_id is not None:
        query = query.where(models.Change.run_id == run_id)
    return session.scalars(query.order_by(models.Change.seq).limit(limit)).all()


def forget_run(session: Session, run_id: str) -> None:
    """Take a run's changes off the feed, since there is nothing left to look up."""
    session.execute(delete(models.Change).where(models.Change.run_id == run_id))


def deleted_runs(session: Session, run_ids: Sequence[str]) -> set[str]:
    """Which of these runs a user has deleted."""
    query = select(models.Change.run_id).where(
        models.Change.kind == "run_deleted", models.Change.run_id.in_(run_ids)
    )
    return {run_id for run_id in session.scalars(query) if run_id is not None}


def forget_deletion(session: Session, run_id: str) -> None:
    """Let a deleted run come back (it is being imported)."""
    session.execute(
        delete(models.Change).where(
            models.Change.kind == "run_deleted", models.Change.run_id == run_id
        )
    )
