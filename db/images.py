"""Images of runs; their bytes lie on disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from . import models


def of_run(session: Session, run: int) -> Sequence[models.Image]:
    """A run's images in the order in which they were taken."""
    query = select(models.Image).where(models.Image.run == run).order_by(models.Image.seq)
    return session.scalars(query).all()


def finals_of(session: Session, runs: Collection[int]) -> dict[int, list[models.Image]]:
    """Finished images of several runs, each run's in the order in which they were taken."""
    finals: dict[int, list[models.Image]] = {run: [] for run in runs}
    query = (
        select(models.Image)
        .where(models.Image.run.in_(runs), models.Image.kind == "final")
        .order_by(models.Image.run, models.Image.seq)
    )
    for image in session.scalars(query):
        finals[image.run].append(image)
    return finals


def find(session: Session, image: int) -> models.Image | None:
    """An image by its row's id."""
    return session.get(models.Image, image)


def media_type(session: Session, sha256: str) -> str | None:
    """Media type of an image; None when no run has it."""
    query = select(models.Image.media_type).where(models.Image.sha256 == sha256).limit(1)
    return session.scalar(query)


def unreferenced(session: Session, hashes: Collection[str]) -> set[str]:
    """Which of these images no run has."""
    query = select(models.Image.sha256).where(models.Image.sha256.in_(hashes)).distinct()
    return set(hashes) - set(session.scalars(query))
