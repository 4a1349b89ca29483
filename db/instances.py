"""ComfyUI processes and what their later runs begin with."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from . import models


def find(session: Session, instance_id: str) -> models.Instance | None:
    """An instance by its id."""
    return session.get(models.Instance, instance_id)


def newest_first(session: Session) -> Sequence[models.Instance]:
    """All instances, the one heard last first."""
    query = select(models.Instance).order_by(
        models.Instance.last_seen_at.desc(), models.Instance.instance_id
    )
    return session.scalars(query).all()


def current_settings(session: Session, instance_id: str) -> Sequence[models.InstanceSettings]:
    """Per variant the newest settings row, also where it takes settings back."""
    newest = (
        select(func.max(models.InstanceSettings.id))
        .where(models.InstanceSettings.instance_id == instance_id)
        .group_by(models.InstanceSettings.variant)
    )
    query = (
        select(models.InstanceSettings)
        .where(models.InstanceSettings.id.in_(newest))
        .order_by(models.InstanceSettings.id)
    )
    return session.scalars(query).all()


def override(session: Session, instance_id: str, variant: str) -> models.InstanceSettings | None:
    """The newest settings row of a variant; None when there never was one."""
    query = (
        select(models.InstanceSettings)
        .where(
            models.InstanceSettings.instance_id == instance_id,
            models.InstanceSettings.variant == variant,
        )
        .order_by(models.InstanceSettings.id.desc())
        .limit(1)
    )
    return session.scalar(query)
