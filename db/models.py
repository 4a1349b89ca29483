"""The tables.

REAL columns may hold infinities. NaN has no place in SQLite (it becomes NULL), so each table of
measurements has a text column that names its columns whose value was NaN; NULL elsewhere means
"not measured". `numbers.py` puts the two together.

Runs and layers have small integer keys of their own, since the large table repeats them in every
row; the view ``layer_steps_readable`` shows it with the names that people know.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ..attention.metrics import METRIC_NAMES

Key = BigInteger().with_variant(Integer, "sqlite")
WITHOUT_ROWID = {"sqlite_with_rowid": False}
"""The primary key is the table: no second copy of it in an index."""


class Base(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map: ClassVar[Any] = {
        float: Double(),
        dict[str, Any]: JSON(),
        list[Any]: JSON(),
    }


class Counter(Base):
    """Numbers that are never given twice, though what they numbered may be deleted."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)


class Instance(Base):
    """One ComfyUI process with the plugin."""

    __tablename__ = "instances"

    instance_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    started_at: Mapped[float]
    plugin_version: Mapped[str] = mapped_column(Text)
    comfyui_version: Mapped[str] = mapped_column(Text)
    torch_version: Mapped[str] = mapped_column(Text)
    python_version: Mapped[str] = mapped_column(Text)
    platform: Mapped[str] = mapped_column(Text)
    device: Mapped[str] = mapped_column(Text)
    device_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    last_seen_at: Mapped[float]


class Run(Base):
    """One execution of a sampler, with figures over all of its steps so far."""

    __tablename__ = "runs"
    __table_args__ = (
        Index("ix_runs_started_at", "started_at"),
        Index("ix_runs_status", "status"),
        Index("ix_runs_instance_id", "instance_id"),
        Index("ix_runs_conditions", "conditions", "variant"),
        # ids are never given twice: a deleted run's rows can't fall to a new one
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Key, primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(String(32), unique=True)
    instance_id: Mapped[str] = mapped_column(ForeignKey("instances.instance_id"))
    label: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16))
    error: Mapped[str] = mapped_column(Text, default="")
    variant: Mapped[str] = mapped_column(String(64))
    settings: Mapped[dict[str, Any]]
    revision: Mapped[int] = mapped_column(default=0)
    applied_revision: Mapped[int] = mapped_column(default=0)
    instance_revision: Mapped[int | None]
    sampling: Mapped[dict[str, Any]]
    model: Mapped[dict[str, Any]]
    conditions: Mapped[str | None] = mapped_column(String(64))
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    ended_seq: Mapped[int | None] = mapped_column(BigInteger)
    last_event_at: Mapped[float]
    heard_at: Mapped[float]
    duration_ms: Mapped[float | None]
    durable_seq: Mapped[int] = mapped_column(BigInteger, default=-1)
    steps_total: Mapped[int] = mapped_column(default=0)
    steps_done: Mapped[int] = mapped_column(default=0)
    steps_duplicate: Mapped[int] = mapped_column(default=0)
    last_step: Mapped[int | None]
    nmse_median_sum: Mapped[float] = mapped_column(default=0.0)
    nmse_median_count: Mapped[int] = mapped_column(default=0)
    nmse_worst: Mapped[float | None]
    worst_layer: Mapped[str | None] = mapped_column(Text)
    calls: Mapped[int] = mapped_column(BigInteger, default=0)
    calls_gated: Mapped[int] = mapped_column(BigInteger, default=0)
    calls_fallback: Mapped[int] = mapped_column(BigInteger, default=0)
    fallback_share: Mapped[float | None]
    attn_ms: Mapped[float | None]
    nonfinite: Mapped[int] = mapped_column(BigInteger, default=0)
    events_lost: Mapped[int] = mapped_column(BigInteger, default=0)
    preview: Mapped[str | None] = mapped_column(String(64))
    final: Mapped[str | None] = mapped_column(String(64))
    interrupt_id: Mapped[int | None] = mapped_column(BigInteger)
    nan_fields: Mapped[str | None] = mapped_column(Text)


def run_key() -> Column[int]:
    """The column of a table's run, the first of its primary key."""
    return Column("run", Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)


class RunLayer(Base):
    """Name of each layer of a run; the numbers follow the model's order."""

    __tablename__ = "run_layers"
    __table_args__ = WITHOUT_ROWID

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True
    )
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(64))


class Step(Base):
    """One closed step with figures over its layers."""

    __tablename__ = "steps"
    __table_args__ = WITHOUT_ROWID

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True
    )
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(BigInteger)
    sigma: Mapped[float | None]
    closed_at: Mapped[float]
    model_calls: Mapped[int] = mapped_column(BigInteger)
    duration_ms: Mapped[float | None]
    revision: Mapped[int]
    nmse_median: Mapped[float | None]
    nmse_worst: Mapped[float | None]
    worst_layer: Mapped[str | None] = mapped_column(Text)
    cosine_median: Mapped[float | None]
    cosine_worst: Mapped[float | None]
    calls: Mapped[int] = mapped_column(BigInteger)
    fallback_share: Mapped[float | None]
    gated_share: Mapped[float | None]
    attn_ms: Mapped[float | None]
    qk_std_median: Mapped[float | None]
    qk_p01_min: Mapped[float | None]
    qk_p99_max: Mapped[float | None]
    denom_min: Mapped[float | None]
    nonfinite: Mapped[int]
    nan_fields: Mapped[str | None] = mapped_column(Text)


LAYER_STEP_FIELDS: tuple[str, ...] = (
    "run",
    "step",
    "layer",
    "path",
    "calls",
    "calls_variant",
    "calls_gated",
    "calls_fallback",
    "tokens_q",
    "tokens_k",
    "nan_metrics",
)
"""Columns of ``layer_steps`` before those of the metrics."""

layer_steps = Table(
    "layer_steps",
    Base.metadata,
    run_key(),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("layer", Integer, primary_key=True, autoincrement=False),
    Column("path", Text, nullable=False),
    Column("calls", BigInteger, nullable=False),
    Column("calls_variant", BigInteger, nullable=False),
    Column("calls_gated", BigInteger, nullable=False),
    Column("calls_fallback", BigInteger, nullable=False),
    Column("tokens_q", BigInteger, nullable=False),
    Column("tokens_k", BigInteger, nullable=False),
    Column("nan_metrics", Text),
    *(Column(name, Double) for name in METRIC_NAMES),
    sqlite_with_rowid=False,
)
"""What each layer did at each step; one REAL column per metric of ``attention/metrics.py``."""


class Reason(Base):
    """How often a gate or a fallback sent a layer's calls to exact attention in one step, or a
    choice gave them to a variant."""

    __tablename__ = "reasons"
    __table_args__ = WITHOUT_ROWID

    run: Mapped[int] = mapped_column(
        Key, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True
    )
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    reason: Mapped[str] = mapped_column(String(200), primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)
    detail: Mapped[str] = mapped_column(Text)


class Revision(Base):
    """One complete set of settings of a run."""

    __tablename__ = "revisions"
    __table_args__ = (UniqueConstraint("run", "number", name="uq_revisions_run_number"),)

    id: Mapped[int] = mapped_column(Key, primary_key=True, autoincrement=False)
    run: Mapped[int] = mapped_column(Key, ForeignKey("runs.id", ondelete="CASCADE"))
    number: Mapped[int]
    base: Mapped[int | None]
    variant: Mapped[str] = mapped_column(String(64))
    settings: Mapped[dict[str, Any]]
    changes: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
    requested_at: Mapped[float]
    delivered_at: Mapped[float | None]
    settled_at: Mapped[float | None]
    applied_step: Mapped[int | None] = mapped_column(BigInteger)
    instance_revision: Mapped[int | None] = mapped_column(BigInteger)
    tuned: Mapped[bool] = mapped_column(default=False, server_default=false())


class InstanceSettings(Base):
    """What later runs of an instance begin with; the newest row of a variant holds."""

    __tablename__ = "instance_settings"
    __table_args__ = (Index("ix_instance_settings_instance", "instance_id", "variant"),)

    id: Mapped[int] = mapped_column(Key, primary_key=True, autoincrement=False)
    instance_id: Mapped[str] = mapped_column(ForeignKey("instances.instance_id"))
    variant: Mapped[str] = mapped_column(String(64))
    settings: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    requested_at: Mapped[float]


class Image(Base):
    """A preview or a finished image; its bytes lie on disk under their hash."""

    __tablename__ = "images"
    __table_args__ = (
        Index("ix_images_run", "run"),
        Index("ix_images_sha256", "sha256"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Key, primary_key=True, autoincrement=True)
    run: Mapped[int] = mapped_column(Key, ForeignKey("runs.id", ondelete="CASCADE"))
    seq: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    step: Mapped[int | None] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(32))
    width: Mapped[int]
    height: Mapped[int]
    bytes: Mapped[int]
    at: Mapped[float]


class Change(Base):
    """One item of the change feed: what it names is looked up when the item is read."""

    __tablename__ = "changes"
    __table_args__ = (Index("ix_changes_run_id", "run_id", "seq"),)

    seq: Mapped[int] = mapped_column(Key, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(16))
    run_id: Mapped[str | None] = mapped_column(String(32))
    reference: Mapped[str] = mapped_column(String(64))
