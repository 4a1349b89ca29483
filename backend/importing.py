"""Runs from a file of JSON lines, through the same code that takes a plugin's events.

The file is one that export wrote, or one of results of hybrid attention.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from ..db import changes, migrate, models, revisions, runs
from ..db.session import Store, Transaction
from ..wire import AnyEvent, Batch, ImageTaken, InstanceInfo, RevisionState
from . import archive, hybrid_results, ingest, validation
from .comparing import Comparer
from .config import Config
from .feed import Feed
from .image_files import ImageFiles
from .mailbox import Mailboxes
from .problems import FieldErrors, ProblemError, sentence
from .schemas import Revision
from .services import Services

BATCH_EVENTS = 200
BATCH_IMAGE_BYTES = 16 * 1024 * 1024


class ImportFailed(Exception):
    """The file can't be imported; the message names the line."""


@dataclass
class Report:
    """What an import has done."""

    runs: int = 0
    stored: int = 0
    known: int = 0


def import_file(config: Config, path: Path) -> Report:
    """Take runs from a file. A file with a bad line changes nothing.

    Args:
        path: the file; unpacked where it is gzip; ``-`` is standard input.

    Raises:
        ImportFailed: naming the bad line, or saying why the database can't be used.
        OSError: the file can't be read.
    """
    config.data_dir.mkdir(parents=True, exist_ok=True)
    store = Store(config.url, config.busy_timeout)
    files = ImageFiles(config.images_dir)
    services = Services(
        config=config,
        store=store,
        feed=Feed(),
        mailboxes=Mailboxes(),
        images=files,
        comparer=Comparer(files),
    )
    try:
        migrate.upgrade(store)
        services.images.folder.mkdir(parents=True, exist_ok=True)
        with _readable(path) as file:
            return import_lines(services, file)
    except migrate.NewerDatabase as error:
        raise ImportFailed(str(error)) from None
    finally:
        store.close()


@contextmanager
def _readable(path: Path) -> Iterator[IO[bytes]]:
    """The file as one that can be read twice."""
    if str(path) == "-":
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.seek(0)
            with _unpacked(copy) as file:
                yield file
        return
    with path.open("rb") as raw, _unpacked(raw) as file:
        yield file


@contextmanager
def _unpacked(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    magic = raw.read(2)
    raw.seek(0)
    if magic == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=raw, mode="rb") as file:
            yield file  # type: ignore[misc]
    else:
        yield raw


def import_lines(services: Services, file: IO[bytes]) -> Report:
    """Take runs from lines; they are read twice, first to check them all.

    Raises:
        ImportFailed: naming the bad line; nothing was stored.
    """
    if hybrid_results.is_result(file.readline()):
        file.seek(0)
        return _import_results(services, file)
    file.seek(0)
    for _ in _lines(file, services.config):
        pass
    file.seek(0)
    reader = _Importer(services)
    for number, line in _lines(file, services.config):
        try:
            reader.take(line)
        except (FieldErrors, ProblemError) as error:
            raise ImportFailed(f"line {number}: {error}") from None
    return reader.report


def _lines(file: IO[bytes], config: Config) -> Iterator[tuple[int, archive.Line]]:
    number = 0
    last: archive.Line | None = None
    instance_known = False
    try:
        for number, text in enumerate(file, start=1):
            line = _parse(number, text, config)
            if (number == 1) != isinstance(line, archive.Head):
                raise ImportFailed(f"line {number}: {_HEAD_RULE}")
            if isinstance(line, archive.Head) and line.version > archive.VERSION:
                raise ImportFailed(
                    f"line 1: version: {line.version}; allowed: at most {archive.VERSION}. A "
                    "newer AttnScope wrote the file."
                )
            if isinstance(last, archive.End):
                raise ImportFailed(f"line {number}: comes after the line that ends the file")
            instance_known = instance_known or isinstance(line, archive.InstanceLine)
            if isinstance(line, archive.EventLine) and not instance_known:
                raise ImportFailed(f"line {number}: an event before any instance")
            last = line
            yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ImportFailed(f"line {number + 1}: the packed file is broken ({error})") from None
    if not isinstance(last, archive.End):
        raise ImportFailed(f"line {number + 1}: the file is cut off; its last line is missing")


def _import_results(services: Services, file: IO[bytes]) -> Report:
    read = []
    for number, text in hybrid_results.lines(file):
        try:
            instance, events = hybrid_results.events_of(text)
            for event in events:
                validation.check_event(event, "result", services.config)
        except (hybrid_results.BadLine, FieldErrors) as error:
            raise ImportFailed(f"line {number}: {error}") from None
        read.append((instance, events))
    importer = _Importer(services)
    for instance, events in read:
        importer.take_run(instance, events)
    return importer.report


_HEAD_RULE = 'the first line, and no other, must say "kind": "attnscope-runs"'


def _parse(number: int, text: bytes, config: Config) -> archive.Line:
    try:
        line = archive.LINE.validate_json(text)
        if isinstance(line, archive.EventLine):
            validation.check_event(line.event, "event", config)
    except ValidationError as error:
        errors = [{**e, "loc": _place(e["loc"])} for e in error.errors(include_url=False)]
        problems = validation.field_problems(errors)
        raise ImportFailed(f"line {number}: {sentence(problems)}") from None
    except FieldErrors as error:
        raise ImportFailed(f"line {number}: {error}") from None
    return line


def _place(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """A place in a line without the names of the kinds that pydantic puts into it."""
    inner = tuple(loc[1:])
    return (*inner[:1], *inner[2:]) if inner[:1] == ("event",) else inner


class _Importer:
    def __init__(self, services: Services) -> None:
        self.services = services
        self.report = Report()
        self.instance: InstanceInfo | None = None
        self.events: list[AnyEvent] = []
        self.image_bytes = 0

    def take(self, line: archive.Line) -> None:
        if isinstance(line, archive.InstanceLine):
            self.instance = line.instance
        elif isinstance(line, archive.EventLine):
            self._take_event(line.event)
        elif isinstance(line, archive.RevisionLine):
            self._flush()
            self._store_revision(line.revision)
        elif isinstance(line, archive.RunLine):
            self._flush()
            self._close_run(line)
            self.report.runs += 1

    def take_run(self, instance: InstanceInfo, events: list[AnyEvent]) -> None:
        """A whole run; one that is known already stays as it is."""
        self.instance = instance
        self.report.runs += 1
        with self.services.store.read() as session:
            if runs.find(session, events[0].run_id) is not None:
                self.report.known += len(events)
                return
        self.events = events
        self._flush()

    def _take_event(self, event: AnyEvent) -> None:
        self.events.append(event)
        if isinstance(event, ImageTaken):
            self.image_bytes += len(event.data)
        if len(self.events) >= BATCH_EVENTS or self.image_bytes >= BATCH_IMAGE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self.events:
            return
        assert self.instance is not None
        run_id = self.events[0].run_id
        with self.services.store.read() as session:
            run = runs.find(session, run_id)
            durable = run.durable_seq if run else -1
        new = sum(1 for event in self.events if event.seq > durable)
        # the types were checked as the line was read; checking a copy again would cost as much
        batch = Batch.model_construct(instance=self.instance, events=self.events)
        ingest.store(self.services, batch, replay=True)
        self.report.stored += new
        self.report.known += len(self.events) - new
        self.events = []
        self.image_bytes = 0

    def _store_revision(self, revision: Revision) -> None:
        def work(tx: Transaction) -> None:
            run = runs.find(tx.session, revision.run_id)
            if run is None:
                raise ProblemError(409, "unknown-run", "a revision before its run_started")
            values = revision.model_dump(exclude={"id", "run_id"})
            values["state"] = revision.state.value
            values["changes"] = {name: list(pair) for name, pair in revision.changes.items()}
            row = revisions.numbered(tx.session, run.id, revision.number)
            if row is None:
                row = models.Revision(
                    id=changes.take_numbers(tx.session, changes.MESSAGE_COUNTER),
                    run=run.id,
                    **values,
                )
                tx.session.add(row)
            elif row.state in revisions.OPEN_STATES:
                for name, value in values.items():
                    setattr(row, name, value)
            else:
                return
            run.revision = max(run.revision, revision.number)
            applied = revision.state is RevisionState.APPLIED
            if applied and revision.number >= run.applied_revision:
                run.applied_revision = revision.number
                run.settings = revision.settings
            tx.changed("revision", run.run_id, row.id)

        self.services.store.write(work)

    def _close_run(self, line: archive.RunLine) -> None:
        def work(tx: Transaction) -> None:
            run = runs.find(tx.session, line.run_id)
            if run is None or line.durable_seq < run.durable_seq:
                return
            after = {
                "status": line.status.value,
                "durable_seq": line.durable_seq,
                "last_event_at": max(run.last_event_at, line.last_event_at),
                "events_lost": max(run.events_lost, line.events_lost),
                "steps_duplicate": max(run.steps_duplicate, line.steps_duplicate),
            }
            if all(getattr(run, name) == value for name, value in after.items()):
                return
            for name, value in after.items():
                setattr(run, name, value)
            tx.changed("run", run.run_id, run.run_id)

        self.services.store.write(work)
