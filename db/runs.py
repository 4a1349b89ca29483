"""Runs: finding, listing, deleting."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Select, case, delete, func, or_, select
from sqlalchemy.orm import Session

from . import models

RUNNING = "running"


@dataclass(frozen=True)
class Wanted:
    """Which runs to list, and how to sort them."""

    status: Sequence[str] = field(default_factory=list)
    variant: Sequence[str] = field(default_factory=list)
    instance_id: str | None = None
    text: str | None = None
    sort: str | None = None


def find(session: Session, run_id: str) -> models.Run | None:
    """A run by its public id."""
    return session.scalar(select(models.Run).where(models.Run.run_id == run_id))


def find_many(session: Session, run_ids: Collection[str]) -> dict[str, models.Run]:
    """Runs by their public ids; those that don't exist are left out."""
    query = select(models.Run).where(models.Run.run_id.in_(run_ids))
    return {run.run_id: run for run in session.scalars(query)}


def page(
    session: Session, wanted: Wanted, limit: int, offset: int
) -> tuple[Sequence[models.Run], int]:
    """One page of the list of runs, and how many there are in all."""
    query = _filtered(select(models.Run), wanted)
    total = session.scalar(_filtered(select(func.count()).select_from(models.Run), wanted)) or 0
    ordered = query.order_by(*_order(wanted.sort), models.Run.id.desc())
    return session.scalars(ordered.limit(limit).offset(offset)).all(), total


def _filtered(query: Select[Any], wanted: Wanted) -> Select[Any]:
    if wanted.status:
        query = query.where(models.Run.status.in_(wanted.status))
    if wanted.variant:
        query = query.where(models.Run.variant.in_(wanted.variant))
    if wanted.instance_id:
        query = query.where(models.Run.instance_id == wanted.instance_id)
    if wanted.text:
        query = query.where(
            or_(
                models.Run.label.icontains(wanted.text, autoescape=True),
                models.Run.run_id.istartswith(wanted.text, autoescape=True),
                models.Run.variant.icontains(wanted.text, autoescape=True),
            )
        )
    return query


def _order(sort: str | None) -> list[ColumnElement[Any]]:
    if sort is None:
        running = case((models.Run.status == RUNNING, 0), else_=1)
        return [running.asc(), models.Run.started_at.desc()]
    name = sort.removeprefix("-")
    column: ColumnElement[Any] = getattr(models.Run, name).expression
    # NaN is worse than any number and lies in the database as NULL with a mark
    marked = func.coalesce(models.Run.nan_fields, "").contains(name)
    rank = case((marked, 1), (column.is_not(None), 0), else_=2)
    if sort.startswith("-"):
        rank = case((marked, 0), (column.is_not(None), 1), else_=2)
        return [rank.asc(), column.desc()]
    return [rank.asc(), column.asc()]


def completed(
    session: Session, variant: str, conditions: str | None = None, limit: int = 100
) -> Sequence[models.Run]:
    """Completed runs of a variant, newest first.

    Args:
        conditions: digest that they must have; any where left out.
        limit: most runs to answer.
    """
    query = select(models.Run).where(
        models.Run.variant == variant, models.Run.status == "completed"
    )
    if conditions is not None:
        query = query.where(models.Run.conditions == conditions)
    newest = query.order_by(models.Run.started_at.desc(), models.Run.id.desc())
    return session.scalars(newest.limit(limit)).all()


def layer_names(session: Session, run: int) -> list[str]:
    """Names of a run's layers; the place in the list is the layer's number."""
    query = (
        select(models.RunLayer.name)
        .where(models.RunLayer.run == run)
        .order_by(models.RunLayer.layer)
    )
    return list(session.scalars(query))


def layer_names_of(session: Session, runs: Collection[int]) -> dict[int, list[str]]:
    """Names of the layers of several runs."""
    names: dict[int, list[str]] = {run: [] for run in runs}
    query = (
        select(models.RunLayer.run, models.RunLayer.name)
        .where(models.RunLayer.run.in_(runs))
        .order_by(models.RunLayer.run, models.RunLayer.layer)
    )
    for run, name in session.execute(query):
        names[run].append(name)
    return names


def running_of(session: Session, instance_id: str) -> list[str]:
    """Public ids of an instance's running runs, oldest first."""
    query = (
        select(models.Run.run_id)
        .where(models.Run.instance_id == instance_id, models.Run.status == RUNNING)
        .order_by(models.Run.started_at)
    )
    return list(session.scalars(query))


def silent(session: Session, before: float, online: Collection[str]) -> Sequence[models.Run]:
    """Running runs of which nothing was heard since a time, and whose instance is away."""
    query = (
        select(models.Run)
        .join(models.Instance, models.Instance.instance_id == models.Run.instance_id)
        .where(
            models.Run.status == RUNNING,
            models.Run.heard_at < before,
            models.Instance.last_seen_at < before,
            models.Run.instance_id.not_in(online),
        )
    )
    return session.scalars(query).all()


def delete_run(session: Session, run: models.Run) -> None:
    """Delete a run and all that belongs to it."""
    session.execute(delete(models.Run).where(models.Run.id == run.id))
