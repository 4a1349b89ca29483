"""Messages to plugins: every open one at each connection, then new ones as they come."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from ..db import instances, models, revisions
from ..db.session import Transaction
from ..wire import InstanceSettings, InterruptRequested, MailboxMessage, RevisionPushed
from .clock import now
from .services import Services
from .streams import frame

log = logging.getLogger(__name__)


class Mailboxes:
    """Which plugins are connected, and a bell for each."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: Counter[str] = Counter()
        self._bells: dict[str, asyncio.Event] = {}
        self._closed = False

    @property
    def online(self) -> set[str]:
        """Ids of the instances whose mailbox is connected."""
        return {key for key, count in list(self._connections.items()) if count > 0}

    @property
    def closed(self) -> bool:
        """Whether the server is stopping."""
        return self._closed

    def open(self) -> None:
        """Take connections from now on."""
        self._loop = asyncio.get_running_loop()

    def ring(self, instance_id: str) -> None:
        """Say that an instance has new messages; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ring, instance_id)

    def close(self) -> None:
        """End all connections; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end)

    def bell(self, instance_id: str) -> asyncio.Event:
        """What to wait for; take it before looking for messages, or one may be missed."""
        return self._bells.setdefault(instance_id, asyncio.Event())

    def connect(self, instance_id: str) -> bool:
        """Count a connection. Returns whether the instance was away before."""
        self._connections[instance_id] += 1
        return self._connections[instance_id] == 1

    def disconnect(self, instance_id: str) -> bool:
        """Take a connection back. Returns whether the instance is away now."""
        self._connections[instance_id] -= 1
        if self._connections[instance_id] > 0:
            return False
        del self._connections[instance_id]
        self._bells.pop(instance_id, None)
        return True

    def _ring(self, instance_id: str) -> None:
        bell = self._bells.pop(instance_id, None)
        if bell is not None:
            bell.set()

    def _end(self) -> None:
        self._closed = True
        for instance_id in list(self._bells):
            self._ring(instance_id)


async def messages(services: Services, instance_id: str) -> AsyncIterator[bytes]:
    """A plugin's messages as server-sent events, until it leaves or the server stops."""
    boxes = services.mailboxes
    if boxes.connect(instance_id):
        await run_in_threadpool(_seen, services, instance_id)
    sent = 0
    try:
        while not boxes.closed:
            bell = boxes.bell(instance_id)
            for message in await run_in_threadpool(_open, services, instance_id, sent):
                sent = message.id
                data = message.model_dump_json().encode()
                yield frame(data, event=message.kind, id=message.id)
            await bell.wait()
    finally:
        if boxes.disconnect(instance_id) and not boxes.closed:
            # the client is gone and this task is being cancelled: the note must be made anyway
            asyncio.get_running_loop().run_in_executor(None, _left, services, instance_id)


def open_messages(session: Session, instance_id: str, after: int = 0) -> list[MailboxMessage]:
    """Messages of an instance that nothing has settled yet, by id.

    Ids are of one sequence over all kinds, so a receiver that keeps the ids that it has handled
    tells new from known by the id alone.
    """
    found: list[MailboxMessage] = []
    for row in instances.current_settings(session, instance_id):
        found.append(InstanceSettings(id=row.id, variant=row.variant, settings=row.settings))
    for revision, run_id in revisions.open_of_instance(session, instance_id):
        found.append(
            RevisionPushed(
                id=revision.id,
                run_id=run_id,
                number=revision.number,
                variant=revision.variant,
                settings=revision.settings,
            )
        )
    interrupted = select(models.Run).where(
        models.Run.instance_id == instance_id,
        models.Run.interrupt_id.is_not(None),
        models.Run.ended_at.is_(None),
    )
    for run in session.scalars(interrupted):
        assert run.interrupt_id is not None
        found.append(InterruptRequested(id=run.interrupt_id, run_id=run.run_id))
    return sorted((m for m in found if m.id > after), key=lambda message: message.id)


def _open(services: Services, instance_id: str, after: int) -> list[MailboxMessage]:
    with services.store.read() as session:
        return open_messages(session, instance_id, after)


def _seen(services: Services, instance_id: str) -> None:
    _note_presence(services, instance_id)


def _left(services: Services, instance_id: str) -> None:
    try:
        _note_presence(services, instance_id)
    except Exception:
        log.exception("instance %s left, which could not be noted", instance_id)


def _note_presence(services: Services, instance_id: str) -> None:
    def work(tx: Transaction) -> None:
        row = instances.find(tx.session, instance_id)
        if row is not None:
            row.last_seen_at = max(row.last_seen_at, now())
            tx.changed("instance", None, instance_id)

    services.store.write(work)
