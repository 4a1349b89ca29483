"""The schema: migrations up and down, every metric's column, pragmas, the readable view."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable
from support.events import NAN, RunScript

from attnscope.attention.metrics import METRIC_NAMES
from attnscope.backend import cli
from attnscope.db import changes, migrate, models
from attnscope.db.session import Store


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = Store(f"sqlite:///{tmp_path / 'db.sqlite'}")
    yield made
    made.close()


def test_a_fresh_database_has_the_schema_of_the_models(store: Store) -> None:
    assert migrate.upgrade(store) is True
    assert migrate.upgrade(store) is False
    with store.writer.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, models.Base.metadata) == []


def test_down_and_up_again(store: Store) -> None:
    migrate.upgrade(store)
    migrate.downgrade(store, "base")
    with store.writer.begin() as connection:
        assert set(inspect(connection).get_table_names()) == {"alembic_version"}
    assert migrate.upgrade(store) is True
    assert migrate.is_current(store)


def test_a_new_metric_gets_its_column_at_the_next_start(store: Store) -> None:
    migrate.upgrade(store)
    with store.writer.begin() as connection:
        connection.execute(text("DROP VIEW layer_steps_readable"))
        connection.execute(text("ALTER TABLE layer_steps DROP COLUMN attn_ms"))
    assert not migrate.is_current(store)
    assert migrate.upgrade(store) is True
    with store.writer.begin() as connection:
        columns = {column["name"] for column in inspect(connection).get_columns("layer_steps")}
        assert columns == {*models.LAYER_STEP_FIELDS, *METRIC_NAMES}


def test_a_newer_database_is_left_alone_with_a_clear_error(tmp_path: Path, capsys: Any) -> None:
    store = Store(f"sqlite:///{tmp_path / 'attnscope.db'}")
    migrate.upgrade(store)
    with store.writer.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(migrate.NewerDatabase, match="a newer version wrote it"):
        migrate.upgrade(store)
    store.close()
    data = ["--data-dir", str(tmp_path)]
    assert cli.main(["migrate", *data]) == 1
    assert "9999" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "x"), *data]) == 1
    assert cli.main(["serve", "--port", "0", *data]) == 1


def test_the_migrate_command(tmp_path: Path, capsys: Any) -> None:
    data = ["--data-dir", str(tmp_path / "new")]
    assert cli.main(["migrate", *data]) == 0
    assert "migrated" in capsys.readouterr().out
    assert cli.main(["migrate", "--check", *data]) == 0
    assert cli.main(["migrate", *data]) == 0
    assert "was up to date" in capsys.readouterr().out


def test_pragmas(store: Store) -> None:
    migrate.upgrade(store)
    expected = {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 1, "busy_timeout": 5000}
    for engine in (store.reader, store.writer):
        with engine.connect() as connection:
            for name, value in expected.items():
                assert connection.exec_driver_sql(f"PRAGMA {name}").scalar() == value, name


def test_readers_cannot_write(store: Store) -> None:
    migrate.upgrade(store)
    with pytest.raises(Exception, match="readonly"), store.read() as session:
        session.execute(text("DELETE FROM runs"))


def test_a_reader_sees_one_state(store: Store) -> None:
    migrate.upgrade(store)
    with store.read() as session:
        before = changes.latest_seq(session)
        store.write(lambda tx: tx.changed("run_deleted", "a" * 32, "a" * 32))
        assert changes.latest_seq(session) == before
    with store.read() as session:
        assert changes.latest_seq(session) == before + 1


def test_a_failed_write_publishes_nothing(store: Store) -> None:
    migrate.upgrade(store)
    told: list[int] = []
    store.on_change.append(told.append)

    def fail(tx: Any) -> None:
        tx.changed("run_deleted", "a" * 32, "a" * 32)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.write(fail)
    assert told == []
    store.write(lambda tx: tx.changed("run_deleted", "b" * 32, "b" * 32))
    assert told == [1]


def test_numbers_are_never_given_twice(store: Store) -> None:
    migrate.upgrade(store)
    store.write(lambda tx: tx.changed("run_deleted", "a" * 32, "a" * 32))
    store.write(lambda tx: changes.forget_run(tx.session, "a" * 32))
    store.write(lambda tx: tx.changed("run_deleted", "b" * 32, "b" * 32))
    with store.read() as session:
        assert [row.seq for row in changes.after(session, 0, 10)] == [2]


def test_a_person_can_query_the_readable_view(api: Any) -> None:
    script = RunScript(layers=2, steps=2)
    api.send(script.started(), script.step(0, nmse=[NAN, 0.5]))
    file = api.services.config.data_dir / "attnscope.db"
    connection = sqlite3.connect(file)
    rows = connection.execute(
        "SELECT layer, sigma, revision, nmse, nan_metrics, calls_fallback "
        "FROM layer_steps_readable WHERE run_id = ? ORDER BY layer DESC",
        (script.run_id,),
    ).fetchall()
    connection.close()
    assert rows == [("single.1", 1.0, 0, 0.5, None, 1), ("single.0", 1.0, 0, None, "nmse", 1)]


def test_every_table_can_be_made_in_postgresql() -> None:
    for table in models.Base.metadata.sorted_tables:
        sql = str(CreateTable(table).compile(dialect=postgresql.dialect()))
        assert "WITHOUT ROWID" not in sql
        assert "DOUBLE PRECISION" in sql or table.name not in ("steps", "layer_steps")
