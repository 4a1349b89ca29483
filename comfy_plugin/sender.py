"""Sends spooled events to the server, in order, until it has them."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from .outbox import Outbox
from .spool import Entry, Spool

log = logging.getLogger("attnscope")

BATCH_EVENTS = 500
BATCH_BYTES = 2 * 2**20
TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=5)
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
BATCH_GAP_S = 0.03
"""Time between two batches where more waits than one of them holds."""

UNPACKED_BYTES = 16 * 2**10
"""Up to here a request costs less time unpacked than it takes to pack it."""

_EVENT_FIELD = re.compile(r"\bevents[.\[](\d+)")

_REFUSED = frozenset({400, 409, 413, 415, 422})
"""Answers about what was sent, rather than about the moment."""


@dataclass(frozen=True)
class Answer:
    """What came back: a status (0 where nothing did) and the body as far as it is JSON."""

    status: int
    body: dict[str, Any]
    error: str = ""


class Trouble:
    """What keeps a server from taking events: told once, by whichever sender meets it first."""

    def __init__(self) -> None:
        self._kind = ""

    def met(self, kind: str, text: str) -> None:
        """A try has failed."""
        if kind != self._kind:
            self._kind = kind
            log.warning("AttnScope: %s; sampling goes on and events are kept", text)

    def over(self, url: str) -> None:
        """A try has succeeded."""
        if self._kind:
            log.info("AttnScope: the server at %s answers again", url)
            self._kind = ""


class Sender:
    """Sends one spool's events. Lives on the link's loop."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        instance: dict[str, Any],
        spool: Spool,
        outbox: Outbox | None,
        on_answer: Callable[[bool], None],
        trouble: Trouble,
    ) -> None:
        """
        Args:
            session: carries the authorisation.
            url: of the server.
            instance: the `InstanceInfo` of the process that made the events, as JSON values.
            spool: what to send.
            outbox: counts what the server refuses; None for an ended process's events.
            on_answer: told after each try whether the server could be reached.
            trouble: with the server; senders of the same server share it.
        """
        self._session = session
        self._url = f"{url}/api/v1/ingest"
        self._instance = json.dumps(instance).encode()
        self._spool = spool
        self._outbox = outbox
        self._on_answer = on_answer
        self._more = asyncio.Event()
        self._pause = FIRST_PAUSE_S
        self._trouble = trouble
        self._batch = BATCH_EVENTS
        self._restarted: set[str] = set()

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to send."""
        return len(self._spool) == 0

    def wake(self) -> None:
        """There may be something new."""
        self._more.set()

    async def hello(self) -> bool:
        """Make the instance known before its first event; whether the server answered well."""
        answer = await self._post([])
        if answer.status != 200:
            self._failed(answer)
            return False
        self._succeeded()
        return True

    async def run(self, until_empty: bool = False) -> None:
        """Send until cancelled, or until nothing is left."""
        while True:
            self._more.clear()
            if self.idle:
                if until_empty:
                    return
                await self._more.wait()
                continue
            if await self.send_some():
                if not self.idle:
                    await asyncio.sleep(BATCH_GAP_S)
            else:
                await asyncio.sleep(self._pause)
                self._pause = min(self._pause * 2, LONGEST_PAUSE_S)

    async def send_some(self) -> bool:
        """Send the oldest events; whether that got anywhere."""
        entries = self._spool.head(self._batch, BATCH_BYTES)
        lines: list[bytes] = []
        for entry in entries:
            try:
                lines.append(self._spool.data(entry))
            except OSError as error:
                log.warning("AttnScope: an unsent event was lost: %s", error)
                self._give_up([entry])
                return True
        answer = await self._post(lines)
        if answer.status == 200:
            return self._stored(entries, answer)
        if answer.status in _REFUSED:
            return await self._refused(entries, answer)
        self._spool.release()
        self._failed(answer)
        return False

    def _stored(self, entries: list[Entry], answer: Answer) -> bool:
        durable = answer.body.get("durable", {})
        stored = [entry for entry in entries if entry.seq <= durable.get(entry.run_id, -1)]
        self._batch = min(BATCH_EVENTS, self._batch * 2)
        if not stored:
            self._failed(Answer(0, {}, f"{self._url} stored nothing of what it was sent"))
            return False
        self._spool.done(stored)
        self._succeeded()
        return True

    async def _refused(self, entries: list[Entry], answer: Answer) -> bool:
        """Find out what the server doesn't want; everything else is sent again without it."""
        problem = str(answer.body.get("type", "")).rsplit("/", 1)[-1]
        if problem == "unknown-run":
            return await self._start_again(entries, answer)
        if answer.status == 409:
            self._failed(answer)
            return False
        named = _named_event(answer.body)
        if named is not None and named < len(entries):
            self._reject(entries[named], answer)
            return True
        if len(entries) == 1:
            self._reject(entries[0], answer)
            return True
        self._batch = max(1, len(entries) // 2)
        return True

    async def _start_again(self, entries: list[Entry], answer: Answer) -> bool:
        """The server has lost runs, or never heard of them: tell it again that they began."""
        runs = {entry.run_id for entry in entries}
        runs = {run for run in runs if run in answer.error} or runs
        starts = {run: self._spool.start_of(run) for run in runs}
        hopeless = {run for run, data in starts.items() if data is None}
        if hopeless:
            gone = [entry for entry in entries if entry.run_id in hopeless]
            log.warning(
                "AttnScope: the server does not know run %s and its beginning is gone; "
                "%d events are dropped", ", ".join(sorted(hopeless)), len(gone),
            )  # fmt: skip
            self._give_up(gone)
            return True
        if runs <= self._restarted:
            self._restarted.clear()
            self._failed(answer)
            return False
        again = await self._post([data for data in starts.values() if data is not None])
        if again.status != 200:
            self._failed(again)
            return False
        self._restarted |= runs
        return True

    def _reject(self, entry: Entry, answer: Answer) -> None:
        log.warning(
            "AttnScope: the server refused event %d (%s) of run %s: %s",
            entry.seq, entry.kind, entry.run_id, answer.error,
        )  # fmt: skip
        self._give_up([entry])

    def _give_up(self, entries: list[Entry]) -> None:
        self._spool.done(entries)
        if self._outbox is not None:
            self._outbox.lose(entries)

    async def _post(self, lines: list[bytes]) -> Answer:
        body = b'{"protocol":1,"instance":%b,"events":[%b]}' % (self._instance, b",".join(lines))
        headers = {"Content-Type": "application/json"}
        if len(body) > UNPACKED_BYTES:
            body = gzip.compress(body, compresslevel=1)
            headers["Content-Encoding"] = "gzip"
        try:
            async with self._session.post(
                self._url,
                data=body,
                headers=headers,
                timeout=TIMEOUT,
                allow_redirects=False,
            ) as response:
                text = await response.text()
                try:
                    content = json.loads(text)
                except ValueError:
                    content = {}
                content = content if isinstance(content, dict) else {}
                detail = str(content.get("detail") or content.get("title") or response.reason)
                return Answer(response.status, content, f"{response.status}: {detail}"[:500])
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            return Answer(0, {}, str(error) or type(error).__name__)

    def _succeeded(self) -> None:
        self._pause = FIRST_PAUSE_S
        self._restarted.clear()
        self._trouble.over(self._url)
        self._on_answer(True)

    def _failed(self, answer: Answer) -> None:
        """One line per kind of trouble, however long it lasts."""
        if answer.status in (401, 403):
            complaint = (
                f"the server refuses the token ({answer.error}); "
                "set ATTNSCOPE_TOKEN to the one that may steer"
            )
        elif answer.status:
            complaint = f"the server can't take events ({answer.error})"
        else:
            complaint = f"the server can't be reached ({answer.error})"
        self._trouble.met(f"{answer.status}", complaint)
        self._on_answer(False)


def _named_event(body: dict[str, Any]) -> int | None:
    """The index of the event that a refusal names, if it names one."""
    errors = body.get("errors")
    texts = [str(error.get("field", "")) for error in errors or () if isinstance(error, dict)]
    for text in (*texts, str(body.get("detail", ""))):
        match = _EVENT_FIELD.search(text)
        if match:
            return int(match[1])
    return None
