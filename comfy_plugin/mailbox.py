"""Messages from the server: settings for a running sampler, for later runs, and interrupts."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
from pydantic import TypeAdapter, ValidationError

from ..attention.settings import VariantSettings, settings_model
from ..wire import InstanceSettings, InterruptRequested, MailboxMessage, RevisionPushed

log = logging.getLogger("attnscope")

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
SILENCE_S = 60.0
"""The server says something every 15 seconds; after this long the connection counts as dead."""

_MESSAGES: TypeAdapter[Any] = TypeAdapter(MailboxMessage)


def refusal(error: ValidationError) -> str:
    """Field, value and what is allowed, of settings that don't validate."""
    parts = []
    for item in error.errors(include_url=False)[:5]:
        field = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "value_error":
            # Our own validators say field, value and what is allowed.
            parts.append(item["msg"].removeprefix("Value error, "))
            continue
        parts.append(f"{field}: is {item.get('input')!r}; allowed: {item['msg']}")
    return "; ".join(parts)[:500]


@dataclass(frozen=True)
class Remembered:
    """Instance-wide settings: what later runs of a variant begin with."""

    id: int
    settings: VariantSettings


class Shelf:
    """Instance-wide settings by variant. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_variant: dict[str, Remembered] = {}

    def get(self, variant: str) -> Remembered | None:
        """What runs of the variant begin with, if the server said so."""
        with self._lock:
            return self._by_variant.get(variant)

    def put(self, variant: str, id: int, settings: dict[str, Any] | None) -> None:
        """Remember, or forget with None. Settings that don't validate are left out."""
        if settings is None:
            with self._lock:
                self._by_variant.pop(variant, None)
            return
        try:
            checked = settings_model(variant).model_validate(settings)
        except (KeyError, ValidationError) as error:
            reason = refusal(error) if isinstance(error, ValidationError) else str(error.args[0])
            log.warning("AttnScope: settings for later runs are left out: %s", reason)
            return
        with self._lock:
            known = self._by_variant.get(variant)
            if known is None or id >= known.id:
                self._by_variant[variant] = Remembered(id, checked)


class Receiver(Protocol):
    """A run, as the mailbox sees it."""

    def offer(self, revision: RevisionPushed) -> None:
        """Take a revision for the next step."""

    def interrupt(self) -> None:
        """Stop if this is what ComfyUI is sampling now."""


class Mailbox:
    """Listens to the server. Lives on the link's loop."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        instance_id: str,
        find_run: Callable[[str], Receiver | None],
        shelf: Shelf,
        seen: OrderedDict[tuple[str, int], None],
    ) -> None:
        """
        Args:
            session: carries the authorisation.
            url: of the server.
            instance_id: this process.
            find_run: the active run of an id.
            shelf: for the settings of later runs.
            seen: kinds and ids of messages that were handled; kept over reconnections.
        """
        self._session = session
        self._url = f"{url}/api/v1/instances/{instance_id}/mailbox"
        self._find_run = find_run
        self._shelf = shelf
        self._seen = seen

    async def run(self) -> None:
        """Listen until cancelled; every loss of connection is followed by a new try."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                async for data in self._stream():
                    pause = FIRST_PAUSE_S
                    self.handle(data)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
                # The sender tells of a server that can't be reached; saying it twice helps nobody.
                pass
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)

    async def _stream(self) -> AsyncIterator[str]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S)
        headers = {"Accept": "text/event-stream"}
        async with self._session.get(
            self._url, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            if response.status != 200:
                return
            data: list[str] = []
            async for raw in response.content:
                line = raw.decode("utf-8", errors="replace").rstrip("\r\n")
                if not line:
                    if data:
                        yield "\n".join(data)
                        data = []
                elif line.startswith("data:"):
                    data.append(line[5:].removeprefix(" "))

    def handle(self, data: str) -> None:
        """Act on one message, once, whatever it says."""
        try:
            message = _MESSAGES.validate_json(data)
        except ValidationError as error:
            log.warning("AttnScope: a message of the server can't be read: %s", refusal(error))
            return
        key = (message.kind, message.id)
        if isinstance(message, RevisionPushed) and self._find_run(message.run_id) is None:
            # Its run may be about to begin; the message stays open and comes again.
            return
        if key in self._seen:
            return
        self._seen[key] = None
        while len(self._seen) > 10_000:
            self._seen.popitem(last=False)
        try:
            self._act(message)
        except Exception:
            log.exception("AttnScope: a message of the server could not be handled")

    def _act(self, message: RevisionPushed | InstanceSettings | InterruptRequested) -> None:
        if isinstance(message, InstanceSettings):
            self._shelf.put(message.variant, message.id, message.settings)
            return
        run = self._find_run(message.run_id)
        if isinstance(message, RevisionPushed):
            if run is not None:
                run.offer(message)
        elif run is not None:
            run.interrupt()
