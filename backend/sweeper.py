"""Looks after what nobody reports: runs of which nothing is heard any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from starlette.concurrency import run_in_threadpool

from ..db import runs
from ..db.session import Transaction
from ..wire import RunStatus
from . import feed
from .clock import now
from .services import Services

log = logging.getLogger(__name__)


class Sweeper:
    """A task that looks for lost runs every few seconds."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; a run gets the whole grace anew, since the server itself was away."""
        self._task = asyncio.create_task(self._loop(now()))

    async def stop(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _loop(self, started_at: float) -> None:
        config = self.services.config
        while True:
            await asyncio.sleep(config.sweep_every)
            try:
                if now() - started_at >= config.lost_after:
                    await run_in_threadpool(sweep, self.services)
                # another process may have written (an import)
                self.services.feed.notify(await run_in_threadpool(feed.newest, self.services))
            except Exception:
                log.exception("looking for lost runs failed")


def sweep(services: Services) -> list[str]:
    """Mark runs as lost.

    Returns:
        Their ids.
    """
    before = now() - services.config.lost_after
    online = services.mailboxes.online
    with services.store.read() as session:
        if not runs.silent(session, before, online):
            return []

    def work(tx: Transaction) -> list[str]:
        lost = []
        for run in runs.silent(tx.session, before, online):
            run.status = RunStatus.LOST.value
            tx.changed("run", run.run_id, run.run_id)
            tx.changed("instance", None, run.instance_id)
            lost.append(run.run_id)
        return lost

    return services.store.write(work)
