"""The change feed: every reader goes at its own pace over one sequence in the database.

A reader is a position. What is new is read from the database once, turned into bytes once and
kept in a window that all readers share; one that has fallen behind the window reads its pages
from the database itself. So nobody has a queue that could overflow, no reader can hold up the
writer, and there is neither gap nor duplicate, whoever wrote and however often a client returns.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, cast

from pydantic import BaseModel
from pydantic_core import to_json
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from ..db import changes, images, instances, models, revisions, runs, steps
from . import distillation, serial
from .problems import ProblemError
from .schemas import Change, Changes
from .services import Services
from .streams import frame

PAGE = 256
WINDOW_ITEMS = 4096
WINDOW_BYTES = 32 * 1024 * 1024


class Item(NamedTuple):
    """A change as bytes for the stream."""

    seq: int
    run_id: str | None
    frame: bytes


class Feed:
    """Wakes readers and keeps the newest changes as bytes."""

    def __init__(self) -> None:
        self._services: Services | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._closed = False
        self._latest = 0
        self._window: list[Item] = []
        self._window_bytes = 0
        self._low = 0
        self._high = 0
        self._filling = asyncio.Lock()

    async def open(self, services: Services) -> None:
        """Begin at the newest change."""
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._latest = self._low = self._high = await run_in_threadpool(newest, services)
        services.store.on_change.append(self.notify)

    def notify(self, latest: int) -> None:
        """Say that there is something new; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._advance, latest)

    def close(self) -> None:
        """End all streams; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end)

    def _advance(self, latest: int) -> None:
        if latest > self._latest:
            self._latest = latest
            self._wake()

    def _end(self) -> None:
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        woken, self._woken = self._woken, asyncio.Event()
        woken.set()

    async def frames(self, position: int, run_id: str | None = None) -> AsyncIterator[bytes]:
        """Changes after a position, for ever, as server-sent events."""
        while not self._closed:
            woken = self._woken
            if position < self._latest:
                items, position = await self._after(position, run_id)
                for item in items:
                    if self._closed:
                        return
                    yield item.frame
            else:
                await woken.wait()

    async def _after(self, position: int, run_id: str | None) -> tuple[Sequence[Item], int]:
        assert self._services is not None
        if position < self._low:
            return await run_in_threadpool(_load, self._services, position, run_id)
        async with self._filling:
            if self._high < self._latest:
                items, self._high = await run_in_threadpool(_load, self._services, self._high)
                self._keep(items)
        if position < self._low:
            return (), position
        start = bisect_right(self._window, position, key=lambda item: item.seq)
        chosen = [i for i in self._window[start:] if run_id is None or i.run_id == run_id]
        return chosen, self._high

    def _keep(self, items: Sequence[Item]) -> None:
        self._window.extend(items)
        self._window_bytes += sum(len(item.frame) for item in items)
        drop = max(0, len(self._window) - WINDOW_ITEMS)
        excess = self._window_bytes - sum(len(item.frame) for item in self._window[:drop])
        while excess > WINDOW_BYTES and drop < len(self._window) - 1:
            excess -= len(self._window[drop].frame)
            drop += 1
        if drop:
            self._low = self._window[drop - 1].seq
            self._window_bytes = excess
            del self._window[:drop]


def newest(services: Services) -> int:
    """Number of the newest change."""
    with services.store.read() as session:
        return changes.latest_seq(session)


def start_position(services: Services, position: int | None) -> int:
    """Where a stream begins.

    Raises:
        ProblemError: the position lies beyond the newest change (409), so it stems from another
            database and the caller must load everything anew.
    """
    latest = newest(services)
    if position is not None and position > latest:
        raise ProblemError(
            409,
            "feed-reset",
            f"after: {position} lies beyond the newest change; allowed: at most {latest}. The "
            "database is another one: load everything anew.",
        )
    # another process may have written: then readers must not wait for this one's next write
    services.feed.notify(latest)
    return latest if position is None else position


def page(services: Services, after: int, run_id: str | None, limit: int) -> Changes:
    """Changes after a position, as one answer.

    Raises:
        ProblemError: the position lies beyond the newest change (409).
    """
    start_position(services, after)
    with services.store.read() as session:
        latest = changes.latest_seq(session)
        rows = changes.after(session, after, limit + 1, run_id)
        found = hydrate(session, rows[:limit], services.mailboxes.online)
        items = [
            Change.model_construct(
                seq=row.seq,
                kind=cast(changes.Kind, row.kind),
                run_id=row.run_id,
                data=_plain(data),
            )
            for row, data in found
        ]
    return Changes.model_construct(items=items, latest_seq=latest, more=len(rows) > limit)


def _load(services: Services, after: int, run_id: str | None = None) -> tuple[Sequence[Item], int]:
    with services.store.read() as session:
        latest = changes.latest_seq(session)
        rows = changes.after(session, after, PAGE, run_id)
        found = hydrate(session, rows, services.mailboxes.online)
        items = [Item(row.seq, row.run_id, _frame(row, data)) for row, data in found]
    return items, rows[-1].seq if len(rows) == PAGE else latest


def _frame(row: models.Change, data: BaseModel | dict[str, Any]) -> bytes:
    payload = data.model_dump_json() if isinstance(data, BaseModel) else _json(data)
    head = _json({"seq": row.seq, "kind": row.kind, "run_id": row.run_id})
    return frame(f'{head[:-1]},"data":{payload}}}'.encode(), event=row.kind, id=row.seq)


def _json(value: Any) -> str:
    return to_json(value, inf_nan_mode="strings").decode()


def _plain(data: BaseModel | dict[str, Any]) -> dict[str, Any]:
    return data.model_dump() if isinstance(data, BaseModel) else data


def hydrate(
    session: Session, rows: Sequence[models.Change], online: set[str]
) -> list[tuple[models.Change, BaseModel | dict[str, Any]]]:
    """Look up what changes name, in its present state."""
    lookup = _Lookup(session, rows, online)
    pairs = ((row, lookup.data(row)) for row in rows)
    return [(row, data) for row, data in pairs if data is not None]


class _Lookup:
    """Looks up what a page of changes names, with few queries."""

    def __init__(self, session: Session, rows: Sequence[models.Change], online: set[str]) -> None:
        self.session = session
        self.online = online
        self.runs = runs.find_many(session, {r.run_id for r in rows if r.run_id is not None})
        self.names = runs.layer_names_of(session, [run.id for run in self.runs.values()])
        self.layer_rows: dict[tuple[int, int], list[Any]] = {}
        self.reasons: dict[tuple[int, int], list[models.Reason]] = {}
        for run_id, run in self.runs.items():
            wanted = [int(r.reference) for r in rows if r.run_id == run_id and r.kind == "step"]
            if not wanted:
                continue
            first, last = min(wanted), max(wanted)
            for row in steps.layer_rows(session, run.id, first, last):
                self.layer_rows.setdefault((run.id, row[1]), []).append(row)
            for reason in steps.reasons(session, run.id, first, last):
                self.reasons.setdefault((run.id, reason.step), []).append(reason)

    def data(self, row: models.Change) -> BaseModel | dict[str, Any] | None:
        """What a change names; None when it is no more."""
        if row.kind == "run_deleted":
            return {"run_id": row.run_id}
        if row.kind == "instance":
            instance = instances.find(self.session, row.reference)
            if instance is None:
                return None
            return serial.instance(self.session, instance, self.online)
        if row.run_id is None or row.run_id not in self.runs:
            return None
        run = self.runs[row.run_id]
        if row.kind == "run":
            return serial.run(self.session, run)
        if row.kind == "step":
            return self._step(run, int(row.reference))
        if row.kind == "revision":
            revision = revisions.find(self.session, int(row.reference))
            return serial.revision(revision, row.run_id) if revision else None
        if row.kind == "training":
            return distillation.totals(self.session, run)
        image = images.find(self.session, int(row.reference))
        return {**serial.image(image).model_dump(), "run_id": row.run_id} if image else None

    def _step(self, run: models.Run, number: int) -> BaseModel | None:
        row = steps.find(self.session, run.id, number)
        if row is None:
            return None
        key = (run.id, number)
        return serial.step_delta(
            run.run_id,
            row,
            self.layer_rows.get(key, []),
            self.reasons.get(key, []),
            self.names[run.id],
        )
