"""The first schema.

The metrics' columns of ``layer_steps`` are not here: `db.migrate.add_metric_columns` adds one for
each metric of the version that opens the database.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "changes",
        sa.Column("seq", KEY, autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("run_id", sa.String(length=32), nullable=True),
        sa.Column("reference", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("ix_changes_run_id", "changes", ["run_id", "seq"], unique=False)
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "instances",
        sa.Column("instance_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("plugin_version", sa.Text(), nullable=False),
        sa.Column("comfyui_version", sa.Text(), nullable=False),
        sa.Column("torch_version", sa.Text(), nullable=False),
        sa.Column("python_version", sa.Text(), nullable=False),
        sa.Column("platform", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("device_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("last_seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("instance_id"),
    )
    op.create_table(
        "instance_settings",
        sa.Column("id", KEY, autoincrement=False, nullable=False),
        sa.Column("instance_id", sa.String(length=32), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=False),
        sa.Column("settings", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("requested_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["instance_id"],
            ["instances.instance_id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_instance_settings_instance",
        "instance_settings",
        ["instance_id", "variant"],
        unique=False,
    )
    op.create_table(
        "runs",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("run_id", sa.String(length=32), nullable=False),
        sa.Column("instance_id", sa.String(length=32), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("applied_revision", sa.Integer(), nullable=False),
        sa.Column("instance_revision", sa.Integer(), nullable=True),
        sa.Column("sampling", sa.JSON(), nullable=False),
        sa.Column("model", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("ended_seq", sa.BigInteger(), nullable=True),
        sa.Column("last_event_at", sa.Double(), nullable=False),
        sa.Column("heard_at", sa.Double(), nullable=False),
        sa.Column("duration_ms", sa.Double(), nullable=True),
        sa.Column("durable_seq", sa.BigInteger(), nullable=False),
        sa.Column("steps_total", sa.Integer(), nullable=False),
        sa.Column("steps_done", sa.Integer(), nullable=False),
        sa.Column("steps_duplicate", sa.Integer(), nullable=False),
        sa.Column("last_step", sa.Integer(), nullable=True),
        sa.Column("nmse_median_sum", sa.Double(), nullable=False),
        sa.Column("nmse_median_count", sa.Integer(), nullable=False),
        sa.Column("nmse_worst", sa.Double(), nullable=True),
        sa.Column("worst_layer", sa.Text(), nullable=True),
        sa.Column("calls", sa.BigInteger(), nullable=False),
        sa.Column("calls_gated", sa.BigInteger(), nullable=False),
        sa.Column("calls_fallback", sa.BigInteger(), nullable=False),
        sa.Column("fallback_share", sa.Double(), nullable=True),
        sa.Column("attn_ms", sa.Double(), nullable=True),
        sa.Column("nonfinite", sa.BigInteger(), nullable=False),
        sa.Column("events_lost", sa.BigInteger(), nullable=False),
        sa.Column("preview", sa.String(length=64), nullable=True),
        sa.Column("final", sa.String(length=64), nullable=True),
        sa.Column("interrupt_id", sa.BigInteger(), nullable=True),
        sa.Column("nan_fields", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["instance_id"],
            ["instances.instance_id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("run_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_runs_instance_id", "runs", ["instance_id"], unique=False)
    op.create_index("ix_runs_started_at", "runs", ["started_at"], unique=False)
    op.create_index("ix_runs_status", "runs", ["status"], unique=False)
    op.create_table(
        "images",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("run", KEY, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("media_type", sa.String(length=32), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_images_run", "images", ["run"], unique=False)
    op.create_index("ix_images_sha256", "images", ["sha256"], unique=False)
    op.create_table(
        "layer_steps",
        sa.Column("run", KEY, nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("calls", sa.BigInteger(), nullable=False),
        sa.Column("calls_variant", sa.BigInteger(), nullable=False),
        sa.Column("calls_gated", sa.BigInteger(), nullable=False),
        sa.Column("calls_fallback", sa.BigInteger(), nullable=False),
        sa.Column("tokens_q", sa.BigInteger(), nullable=False),
        sa.Column("tokens_k", sa.BigInteger(), nullable=False),
        sa.Column("nan_metrics", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "step", "layer"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "reasons",
        sa.Column("run", KEY, nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=200), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "step", "layer", "kind", "reason"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "revisions",
        sa.Column("id", KEY, autoincrement=False, nullable=False),
        sa.Column("run", KEY, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("base", sa.Integer(), nullable=True),
        sa.Column("variant", sa.String(length=64), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("changes", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("requested_at", sa.Double(), nullable=False),
        sa.Column("delivered_at", sa.Double(), nullable=True),
        sa.Column("settled_at", sa.Double(), nullable=True),
        sa.Column("applied_step", sa.BigInteger(), nullable=True),
        sa.Column("instance_revision", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("run", "number", name="uq_revisions_run_number"),
    )
    op.create_table(
        "run_layers",
        sa.Column("run", KEY, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "layer"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "steps",
        sa.Column("run", KEY, nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("sigma", sa.Double(), nullable=True),
        sa.Column("closed_at", sa.Double(), nullable=False),
        sa.Column("model_calls", sa.BigInteger(), nullable=False),
        sa.Column("duration_ms", sa.Double(), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("nmse_median", sa.Double(), nullable=True),
        sa.Column("nmse_worst", sa.Double(), nullable=True),
        sa.Column("worst_layer", sa.Text(), nullable=True),
        sa.Column("cosine_median", sa.Double(), nullable=True),
        sa.Column("cosine_worst", sa.Double(), nullable=True),
        sa.Column("calls", sa.BigInteger(), nullable=False),
        sa.Column("fallback_share", sa.Double(), nullable=True),
        sa.Column("gated_share", sa.Double(), nullable=True),
        sa.Column("attn_ms", sa.Double(), nullable=True),
        sa.Column("qk_std_median", sa.Double(), nullable=True),
        sa.Column("qk_p01_min", sa.Double(), nullable=True),
        sa.Column("qk_p99_max", sa.Double(), nullable=True),
        sa.Column("denom_min", sa.Double(), nullable=True),
        sa.Column("nonfinite", sa.Integer(), nullable=False),
        sa.Column("nan_fields", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "step"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("steps")
    op.drop_table("run_layers")
    op.drop_table("revisions")
    op.drop_table("reasons")
    op.drop_table("layer_steps")
    op.drop_index("ix_images_sha256", table_name="images")
    op.drop_index("ix_images_run", table_name="images")
    op.drop_table("images")
    op.drop_index("ix_runs_status", table_name="runs")
    op.drop_index("ix_runs_started_at", table_name="runs")
    op.drop_index("ix_runs_instance_id", table_name="runs")
    op.drop_table("runs")
    op.drop_index("ix_instance_settings_instance", table_name="instance_settings")
    op.drop_table("instance_settings")
    op.drop_table("instances")
    op.drop_table("counters")
    op.drop_index("ix_changes_run_id", table_name="changes")
    op.drop_table("changes")
