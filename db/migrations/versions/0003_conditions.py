"""Runs know by a hash which others they can be compared with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

# Alembic loads this file by its path, so there is nothing to be relative to.
from attnscope.db import conditions

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

RUNS = sa.table(
    "runs",
    sa.column("id", sa.BigInteger()),
    sa.column("sampling", sa.JSON()),
    sa.column("model", sa.JSON()),
    sa.column("conditions", sa.String(64)),
)


def upgrade() -> None:
    op.add_column("runs", sa.Column("conditions", sa.String(length=64), nullable=True))
    op.create_index("ix_runs_conditions", "runs", ["conditions", "variant"], unique=False)
    connection = op.get_bind()
    for run in connection.execute(sa.select(RUNS.c.id, RUNS.c.sampling, RUNS.c.model)).all():
        # The function of today, since what it gives today is what is looked for.
        found = conditions.digest(run.sampling, run.model)
        connection.execute(RUNS.update().where(RUNS.c.id == run.id).values(conditions=found))


def downgrade() -> None:
    op.drop_index("ix_runs_conditions", table_name="runs")
    op.drop_column("runs", "conditions")
