"""The database: engines, pragmas, one writer, consistent reads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from pydantic_core import to_json
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from . import changes

log = logging.getLogger(__name__)
Result = TypeVar("Result")

RETRIES = 3


class StoreBusy(OperationalError):
    """The writer is taken for longer than the busy timeout."""

    def __init__(self) -> None:
        super().__init__("write", None, TimeoutError("database is locked: writer busy"))


@dataclass
class Transaction:
    """One write: what it changes is published when, and only when, it is durable."""

    session: Session
    pending: dict[changes.Pending, None] = field(default_factory=dict)
    after_commit: list[Callable[[], None]] = field(default_factory=list)

    def changed(self, kind: changes.Kind, run_id: str | None, reference: object) -> None:
        """Put something on the change feed, once per transaction."""
        self.pending[changes.Pending(kind, run_id, str(reference))] = None


class Store:
    """A database with one writer per process and any number of readers.

    Args:
        url: SQLAlchemy URL.
        busy_timeout: seconds to wait for a lock, in this process or another one.
    """

    def __init__(self, url: str, busy_timeout: float = 5.0) -> None:
        self.url = url
        self.busy_timeout = busy_timeout
        self.is_sqlite = make_url(url).get_backend_name() == "sqlite"
        self.reader = self._engine(read_only=True)
        self.writer = self._engine(read_only=False)
        self.on_change: list[Callable[[int], None]] = []
        self._lock = threading.Lock()

    def _engine(self, *, read_only: bool) -> Engine:
        options: dict[str, Any] = {
            "json_serializer": dump_json,
            "json_deserializer": orjson.loads,
            "pool_timeout": max(self.busy_timeout, 1.0),
        }
        if read_only:
            options.update(pool_size=8, max_overflow=32)
        else:
            options.update(pool_size=1, max_overflow=1)
        if not self.is_sqlite:
            if read_only:
                options["isolation_level"] = "REPEATABLE READ"
            return create_engine(self.url, **options)
        engine = create_engine(self.url, **options)
        begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        busy_ms = int(self.busy_timeout * 1000)

        @event.listens_for(engine, "connect")
        def _connect(connection: Any, _: Any) -> None:
            # sqlite3 would begin transactions at times of its own choosing
            connection.isolation_level = None
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA busy_timeout={busy_ms}")
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=NORMAL")
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute("PRAGMA cache_size=-32768")
            cursor.execute("PRAGMA temp_store=MEMORY")
            if read_only:
                cursor.execute("PRAGMA query_only=ON")
            cursor.close()

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database from its first query to its last."""
        with self._session(self.reader) as session:
            yield session

    @staticmethod
    def _session(engine: Engine) -> Session:
        return Session(engine, autoflush=False, expire_on_commit=False)

    def write(self, work: Callable[[Transaction], Result]) -> Result:
        """Run a piece of work in one transaction and publish what it changed.

        The work may run more than once, when another process holds the database.

        Raises:
            OperationalError: the database stayed locked, or failed otherwise.
        """
        if not self._lock.acquire(timeout=max(self.busy_timeout, 0.1)):
            raise StoreBusy
        try:
            for attempt in range(RETRIES):
                try:
                    return self._attempt(work)
                except OperationalError as error:
                    if "locked" not in str(error.orig) or attempt == RETRIES - 1:
                        raise
                    log.warning("database locked, trying again: %s", error.orig)
                    time.sleep(0.05 * (attempt + 1))
            raise AssertionError("unreachable")
        finally:
            self._lock.release()

    def _attempt(self, work: Callable[[Transaction], Result]) -> Result:
        latest = 0
        with self._session(self.writer) as session, session.begin():
            transaction = Transaction(session)
            result = work(transaction)
            session.flush()
            if transaction.pending:
                latest = changes.append(session, list(transaction.pending))
        for call in transaction.after_commit:
            call()
        if latest:
            for notify in self.on_change:
                notify(latest)
        return result

    def close(self) -> None:
        """Let go of all connections."""
        self.reader.dispose()
        self.writer.dispose()


def dump_json(value: Any) -> str:
    """JSON in which NaN and infinities are strings."""
    return to_json(value, inf_nan_mode="strings").decode()
