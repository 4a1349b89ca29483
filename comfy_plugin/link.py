"""The one thread that talks to the server, and only while there is something to talk about.

It begins with a run and ends soon after the last one: when everything is sent, or when the server
has been out of reach for a while, in which case the rest waits on disk. Its loop carries, per
server, the sender, the mailbox and the search for finished images.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from .config import Config
from .mailbox import Mailbox, Receiver, Shelf
from .outbox import Outbox
from .sender import Sender, Trouble
from .spool import Spool, left_over, owner_of_this_process

log = logging.getLogger("attnscope")

QUIET_S = 1.0
"""How long the thread stays when everything is done, so that the next run finds it."""

LOOK_S = 0.25
"""How often the thread looks for something to do. Being woken by each event would cost the
sampler's thread a system call and the interpreter, and a request for each fast step."""

PREVIEW_WAIT_S = 0.1

Chore = Callable[[], Awaitable[None]]
"""Something to be done on the loop after a run."""


class Channel:
    """One server: what waits to be sent to it, and the runs that it watches."""

    def __init__(
        self, config: Config, instance: dict[str, Any], root: Path | None, link: Link
    ) -> None:
        """
        Args:
            config: address, token and bounds.
            instance: `InstanceInfo` of this process as JSON values.
            root: folder of all spools; None keeps events in memory.
            link: whose thread serves the channel.
        """
        self.config = config
        self.instance = instance
        self.shelf = Shelf()
        self.root = root
        self.runs: dict[str, Receiver] = {}
        self.chores: deque[Chore] = deque()
        self.busy_until = 0.0
        folder = None
        if root is not None:
            address = "".join(c if c.isalnum() else "-" for c in config.url.split("//", 1)[1])
            folder = root / f"{instance['instance_id']}-{address}"[:120]
        owner = owner_of_this_process(config.url, instance)
        self.spool = Spool(folder, owner, config.spool_bytes)
        self.outbox = Outbox(self.spool, config.queue_events, link.ensure)
        self._seen: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._working = 0
        self._reached = asyncio.Event()
        self._bell = asyncio.Event()
        self._adopting = False
        self._trouble = Trouble()

    @property
    def has_work(self) -> bool:
        """Whether a thread is needed: a run, an unbuilt event, or a chore."""
        return bool(self.runs or len(self.outbox) or self.chores or self._working)

    def finished(self, now: float) -> bool:
        """Whether the thread may go, as far as this channel is concerned."""
        if self.has_work:
            self.busy_until = now
            return False
        if len(self.spool) == 0 and not self._adopting:
            return now - self.busy_until >= QUIET_S
        return now - self.busy_until >= self.config.linger_s

    def look(self) -> None:
        """On the loop: see whether there is something to do."""
        if len(self.outbox) or self.chores or not self.runs:
            self._bell.set()

    async def serve(self) -> None:
        """Do the channel's work until cancelled."""
        self._bell, self._reached = asyncio.Event(), asyncio.Event()
        self._working = 0
        self._bell.set()
        headers = {"User-Agent": f"attnscope/{self.instance.get('plugin_version', '')}"}
        if self.config.token:
            headers["Authorization"] = f"Bearer {self.config.token}"
        tasks: set[asyncio.Task[None]] = set()
        async with aiohttp.ClientSession(headers=headers) as session:
            sender = Sender(
                session, self.config.url, self.instance, self.spool, self.outbox, self._answered,
                self._trouble,
            )  # fmt: skip
            mailbox = Mailbox(
                session, self.config.url, self.instance["instance_id"], self.runs.get,
                self.shelf, self._seen,
            )  # fmt: skip
            try:
                tasks.add(asyncio.create_task(sender.run()))
                tasks.add(asyncio.create_task(self._listen(mailbox)))
                tasks.add(asyncio.create_task(self._adopt(session)))
                while True:
                    self._bell.clear()
                    self._move(sender)
                    while self.chores:
                        task = asyncio.create_task(self._do(self.chores.popleft()))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                    await self._bell.wait()
            finally:
                for task in list(tasks):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._working = 0
                if not self.has_work and len(self.spool) == 0:
                    self.outbox.forget(())
                self.spool.close(self.runs)

    def _move(self, sender: Sender) -> None:
        while self.outbox.next_ready():
            if self.outbox.move_next():
                sender.wake()
            else:
                # A preview comes just before its step closes: alone it would hold the step up.
                asyncio.get_running_loop().call_later(PREVIEW_WAIT_S, sender.wake)
        if len(self.outbox):
            return
        if not self.runs and not self._working:
            self.outbox.flush_lost()
            sender.wake()

    async def _listen(self, mailbox: Mailbox) -> None:
        await self._reached.wait()
        await mailbox.run()

    async def _do(self, chore: Chore) -> None:
        self._working += 1
        try:
            await chore()
        except Exception:
            log.exception("AttnScope: work after a run failed")
        finally:
            self._working -= 1
            self._bell.set()

    async def _adopt(self, session: aiohttp.ClientSession) -> None:
        """Send what earlier processes could not, each under its own name."""
        self._adopting = True
        try:
            for folder, owner in left_over(self.root, self.config.url) if self.root else ():
                if folder == self.spool.folder:
                    continue
                spool = Spool(folder, owner, self.config.spool_bytes)
                try:
                    spool.load()
                    instance = owner["instance"]
                    sender = Sender(
                        session, self.config.url, instance, spool, None, self._answered,
                        self._trouble,
                    )  # fmt: skip
                    await sender.run(until_empty=True)
                except Exception:
                    log.exception("AttnScope: the events in %s could not be sent", folder)
                finally:
                    spool.close()
        finally:
            self._adopting = False

    def _answered(self, well: bool) -> None:
        if well:
            self.busy_until = time.monotonic()
            self._reached.set()


class Link:
    """Starts and ends the thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def add(self, channel: Channel) -> None:
        """Serve a channel from now on."""
        with self._lock:
            self._channels.append(channel)

    def ensure(self) -> None:
        """There is something to do: start the thread where there is none, else it will look."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._live, name="attnscope", daemon=True)
                for channel in self._channels:
                    channel.busy_until = time.monotonic()
                self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end; whether it came in time. Not for the sampler's thread."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return not self.alive

    def _live(self) -> None:
        while True:
            try:
                asyncio.run(self._serve())
            except Exception:
                log.exception("AttnScope: the link to the server broke down")
            with self._lock:
                if not any(channel.has_work for channel in self._channels):
                    self._thread = None
                    return

    async def _serve(self) -> None:
        tasks: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                with self._lock:
                    channels = list(self._channels)
                for channel in channels:
                    task = tasks.get(id(channel))
                    if task is not None and task.done():
                        log.error(
                            "AttnScope: the link to %s broke down and begins again",
                            channel.config.url, exc_info=task.exception(),
                        )  # fmt: skip
                        task = None
                    if task is None:
                        tasks[id(channel)] = asyncio.create_task(channel.serve())
                now = time.monotonic()
                if all([channel.finished(now) for channel in channels]):
                    return
                for channel in channels:
                    channel.look()
                await asyncio.sleep(LOOK_S)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
