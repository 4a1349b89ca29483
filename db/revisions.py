"""Settings revisions of runs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from . import models

OPEN_STATES = ("pending", "delivered")
DROPPED_STATES = ("rejected", "expired")


def of_run(session: Session, run: int) -> Sequence[models.Revision]:
    """A run's revisions, oldest first."""
    query = select(models.Revision).where(models.Revision.run == run)
    return session.scalars(query.order_by(models.Revision.number)).all()


def find(session: Session, revision_id: int) -> models.Revision | None:
    """A revision by its id."""
    return session.get(models.Revision, revision_id)


def numbered(session: Session, run: int, number: int) -> models.Revision | None:
    """A revision by its number within the run."""
    query = select(models.Revision).where(
        models.Revision.run == run, models.Revision.number == number
    )
    return session.scalar(query)


def tuned_of_run(session: Session, run: int) -> Sequence[models.Revision]:
    """Revisions that a run's variant found itself, newest first."""
    query = select(models.Revision).where(models.Revision.run == run, models.Revision.tuned)
    return session.scalars(query.order_by(models.Revision.number.desc())).all()


def newest_standing(session: Session, run: int) -> models.Revision:
    """The newest revision that holds or may yet: what later changes are made on top of."""
    query = (
        select(models.Revision)
        .where(models.Revision.run == run, models.Revision.state.not_in(DROPPED_STATES))
        # What was tuned can have been numbered after a pushed one that came into force later.
        .order_by(
            models.Revision.state.in_(OPEN_STATES).desc(),
            func.coalesce(models.Revision.applied_step, -1).desc(),
            models.Revision.number.desc(),
        )
        .limit(1)
    )
    return session.scalars(query).one()


def open_of_run(session: Session, run: int) -> Sequence[models.Revision]:
    """Revisions that the sampler has not settled yet, oldest first."""
    query = (
        select(models.Revision)
        .where(models.Revision.run == run, models.Revision.state.in_(OPEN_STATES))
        .order_by(models.Revision.number)
    )
    return session.scalars(query).all()


def open_of_instance(session: Session, instance_id: str) -> Sequence[tuple[models.Revision, str]]:
    """Unsettled revisions of an instance's running runs, each with the run's public id."""
    query = (
        select(models.Revision, models.Run.run_id)
        .join(models.Run, models.Run.id == models.Revision.run)
        .where(
            models.Run.instance_id == instance_id,
            models.Run.status == "running",
            models.Revision.state.in_(OPEN_STATES),
        )
        .order_by(models.Revision.id)
    )
    return [(row[0], row[1]) for row in session.execute(query)]
