"""Bringing a database to the schema of this version."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Double, Table, inspect, text
from sqlalchemy.schema import CreateColumn

from ..attention.distillation import TRAINING_METRIC_NAMES
from ..attention.metrics import METRIC_NAMES
from ..version import __version__
from . import models, student_models
from .session import Store

FOLDER = Path(__file__).resolve().parent / "migrations"

READABLE_VIEW = "layer_steps_readable"

METRIC_TABLES = (
    (models.layer_steps, METRIC_NAMES),
    (student_models.student_updates, TRAINING_METRIC_NAMES),
)
"""Tables that have a column for each metric."""


class NewerDatabase(Exception):
    """The database was written by a newer version of AttnScope."""


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration; there is no ini file."""
    result = Config()
    result.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    result.attributes["target_metadata"] = models.Base.metadata
    result.attributes["connection"] = connection
    return result


def head() -> str:
    """Revision of the schema that this version works with."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None
    return revision


def current(connection: Connection) -> str | None:
    """Revision of a database's schema; None when it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(store: Store) -> bool:
    """Bring a database to this version's schema, in one transaction.

    Returns:
        Whether there was anything to do.

    Raises:
        NewerDatabase: a newer version has written it.
    """
    if store.is_sqlite and is_current(store):
        return False
    with store.writer.begin() as connection:
        before = current(connection)
        _refuse_newer(store, before)
        command.upgrade(config(connection), "head")
        added = add_metric_columns(connection)
        return bool(added) or before != head()


def downgrade(store: Store, revision: str) -> None:
    """Take a database back to an older schema; ``base`` leaves it empty."""
    with store.writer.begin() as connection:
        connection.execute(text(f"DROP VIEW IF EXISTS {READABLE_VIEW}"))
        command.downgrade(config(connection), revision)


def is_current(store: Store) -> bool:
    """Whether a database has this version's schema.

    Raises:
        NewerDatabase: a newer version has written it.
    """
    with store.writer.begin() as connection:
        found = current(connection)
        _refuse_newer(store, found)
        return found == head() and not missing_metrics(connection)


def _refuse_newer(store: Store, revision: str | None) -> None:
    scripts = ScriptDirectory.from_config(config())
    known = {script.revision for script in scripts.walk_revisions()}
    if revision is not None and revision not in known:
        raise NewerDatabase(
            f"The database {store.url} has schema {revision}, which AttnScope {__version__} "
            f"does not know (it knows up to {head()}): a newer version wrote it. Update "
            "AttnScope, or choose another data_dir."
        )


def missing_metrics(connection: Connection) -> list[tuple[Table, str]]:
    """Metrics of this version that the database has no column for yet, with their tables."""
    missing: list[tuple[Table, str]] = []
    for table, names in METRIC_TABLES:
        present = {column["name"] for column in inspect(connection).get_columns(table.name)}
        missing.extend((table, name) for name in names if name not in present)
    return missing


def add_metric_columns(connection: Connection) -> list[str]:
    """Give each metric its column, so that a new metric needs no migration of its own.

    Returns:
        Names of the columns that were added.
    """
    missing = missing_metrics(connection)
    for table, name in missing:
        column = table.c[name]
        assert isinstance(column.type, Double)
        definition = CreateColumn(column).compile(dialect=connection.dialect)
        connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))
    _make_view(connection)
    return [name for _, name in missing]


def _make_view(connection: Connection) -> None:
    names = [name for name in models.LAYER_STEP_FIELDS if name not in ("run", "step", "layer")]
    columns = ", ".join(f"layer_steps.{name}" for name in (*names, *METRIC_NAMES))
    connection.execute(text(f"DROP VIEW IF EXISTS {READABLE_VIEW}"))
    connection.execute(
        text(
            f"CREATE VIEW {READABLE_VIEW} AS SELECT runs.run_id, layer_steps.step, "
            "steps.sigma, steps.revision, "
            f"run_layers.name AS layer, {columns} FROM layer_steps "
            "JOIN steps ON steps.run = layer_steps.run AND steps.step = layer_steps.step "
            "JOIN runs ON runs.id = layer_steps.run "
            "JOIN run_layers ON run_layers.run = layer_steps.run "
            "AND run_layers.layer = layer_steps.layer"
        )
    )
