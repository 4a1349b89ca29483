"""The tables of Flux2TTR's training.

The newest updates of each layer are rows of ``student_updates``, which grow by every event. As
soon as a layer has `student_blocks.BLOCK` of them they are packed into ``student_blocks``, one row
per column: a question about one metric then reads that metric's numbers and nothing else.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
)
from sqlalchemy.orm import Mapped, mapped_column

from ..attention.distillation import TRAINING_METRIC_NAMES
from .models import WITHOUT_ROWID, Base, Key, run_key


class Training(Base):
    """What a run's updates of students come to, over all layers."""

    __tablename__ = "trainings"

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    updates: Mapped[int] = mapped_column(BigInteger, default=0)
    nonfinite: Mapped[int] = mapped_column(BigInteger, default=0)
    first_at: Mapped[float | None]
    last_at: Mapped[float | None]
    replay_bytes: Mapped[float | None]
    replay_limit_bytes: Mapped[int | None] = mapped_column(BigInteger)


class StudentBatch(Base):
    """One event of updates: what an export needs to make it anew."""

    __tablename__ = "student_batches"
    __table_args__ = WITHOUT_ROWID

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True
    )
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[float]
    count: Mapped[int]
    replay_limit_bytes: Mapped[int | None] = mapped_column(BigInteger)


class StudentLayer(Base):
    """What a run's updates of one layer's student come to."""

    __tablename__ = "student_layers"
    __table_args__ = WITHOUT_ROWID

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True
    )
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    updates: Mapped[int] = mapped_column(BigInteger, default=0)
    packed: Mapped[int] = mapped_column(BigInteger, default=0)
    first_update: Mapped[int | None] = mapped_column(BigInteger)
    last_update: Mapped[int | None] = mapped_column(BigInteger)
    last_at: Mapped[float | None]
    nonfinite: Mapped[int] = mapped_column(BigInteger, default=0)
    latest: Mapped[dict[str, Any]]


class StudentReadiness(Base):
    """A layer's student became ready, or ceased to be."""

    __tablename__ = "student_readiness"
    __table_args__ = WITHOUT_ROWID

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True
    )
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    ready: Mapped[bool]
    update: Mapped[int] = mapped_column(BigInteger)
    step: Mapped[int | None] = mapped_column(BigInteger)
    at: Mapped[float]


class StudentEventRow(Base):
    """Something else that happened to students."""

    __tablename__ = "student_events"
    __table_args__ = WITHOUT_ROWID

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True
    )
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[float]
    event: Mapped[str] = mapped_column(String(32))
    layer: Mapped[int | None]
    update: Mapped[int | None] = mapped_column(BigInteger)
    step: Mapped[int | None] = mapped_column(BigInteger)
    detail: Mapped[str] = mapped_column(Text)


STUDENT_UPDATE_FIELDS: tuple[str, ...] = (
    "run",
    "layer",
    "place",
    "update",
    "step",
    "seq",
    "at",
    "nan_metrics",
)
"""Columns of ``student_updates`` before those of the metrics."""

STUDENT_UPDATE_COLUMNS: tuple[str, ...] = (*STUDENT_UPDATE_FIELDS, *TRAINING_METRIC_NAMES)

student_updates = Table(
    "student_updates",
    Base.metadata,
    run_key(),
    Column("layer", Integer, primary_key=True, autoincrement=False),
    Column("place", BigInteger, primary_key=True, autoincrement=False),
    Column("update", BigInteger, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
    Column("nan_metrics", Text),
    *(Column(name, Double) for name in TRAINING_METRIC_NAMES),
    sqlite_with_rowid=False,
)
"""The newest updates, counted by ``place`` within run and layer; one column per metric of
``attention/distillation.py``. Older ones lie in ``student_blocks``."""


class StudentBlock(Base):
    """One column of many successive updates of a layer; `student_blocks.py` has the format."""

    __tablename__ = "student_blocks"

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    block: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    count: Mapped[int]
    first_update: Mapped[int] = mapped_column(BigInteger)
    last_update: Mapped[int] = mapped_column(BigInteger)
    data: Mapped[bytes] = mapped_column(LargeBinary)
