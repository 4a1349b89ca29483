"""Training of Flux2TTR's students: updates, readiness, events.

The metrics' columns of ``student_updates`` are not here: `db.migrate.add_metric_columns` adds one
for each metric of the version that opens the database.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = (
    "trainings",
    "student_batches",
    "student_layers",
    "student_readiness",
    "student_events",
    "student_updates",
    "student_blocks",
)


def _number(name: str, *, nullable: bool = False, key: bool = False) -> sa.Column[int]:
    if key:
        return sa.Column(name, sa.BigInteger(), autoincrement=False, nullable=False)
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def _create(name: str, keys: list[str], *columns: sa.Column[Any], rowid: bool = False) -> None:
    op.create_table(
        name,
        sa.Column("run", KEY, autoincrement=False, nullable=False),
        *columns,
        sa.ForeignKeyConstraint(["run"], ["runs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", *keys),
        sqlite_with_rowid=rowid,
    )


def _layer() -> sa.Column[int]:
    return sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False)


def upgrade() -> None:
    _create(
        "trainings",
        [],
        _number("updates"),
        _number("nonfinite"),
        sa.Column("first_at", sa.Double(), nullable=True),
        sa.Column("last_at", sa.Double(), nullable=True),
        sa.Column("replay_bytes", sa.Double(), nullable=True),
        _number("replay_limit_bytes", nullable=True),
        rowid=True,
    )
    _create(
        "student_batches",
        ["seq"],
        _number("seq", key=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        _number("replay_limit_bytes", nullable=True),
    )
    _create(
        "student_layers",
        ["layer"],
        _layer(),
        _number("updates"),
        _number("packed"),
        _number("first_update", nullable=True),
        _number("last_update", nullable=True),
        sa.Column("last_at", sa.Double(), nullable=True),
        _number("nonfinite"),
        sa.Column("latest", sa.JSON(), nullable=False),
    )
    _create(
        "student_readiness",
        ["layer", "number"],
        _layer(),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False),
        _number("update"),
        _number("step", nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
    )
    _create(
        "student_events",
        ["seq"],
        _number("seq", key=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("event", sa.String(length=32), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=True),
        _number("update", nullable=True),
        _number("step", nullable=True),
        sa.Column("detail", sa.Text(), nullable=False),
    )
    _create(
        "student_updates",
        ["layer", "place"],
        _layer(),
        _number("place", key=True),
        _number("update"),
        _number("step"),
        _number("seq"),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("nan_metrics", sa.Text(), nullable=True),
    )
    _create(
        "student_blocks",
        ["name", "layer", "block"],
        sa.Column("name", sa.String(length=32), nullable=False),
        _layer(),
        sa.Column("block", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        _number("first_update"),
        _number("last_update"),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        rowid=True,
    )


def downgrade() -> None:
    for name in reversed(TABLES):
        op.drop_table(name)
