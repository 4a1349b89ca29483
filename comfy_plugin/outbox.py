"""From the sampler's thread to the link's: a bounded queue of drafts, and their numbering.

A draft is an event that isn't built yet. The sampler's thread only appends one; waiting for the
device, encoding pictures, numbering, writing and sending are the link's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from ..wire import Event, EventsLost, RunStarted
from .spool import Entry, Spool

log = logging.getLogger("attnscope")


class Draft(Protocol):
    """An event on its way to being built.

    Attributes:
        run_id: of the run.
        droppable: whether it may go where space runs out.
        urgent: whether it should be sent at once; otherwise it may wait for company.
    """

    run_id: str
    droppable: bool
    urgent: bool

    def ready(self) -> bool:
        """Whether `build` can run without waiting."""

    def build(self, seq: int) -> Event | None:
        """The event under the run's next number; None where there turned out to be none."""


class Outbox:
    """Takes drafts from any thread; the link's thread moves them to the spool."""

    def __init__(self, spool: Spool, limit: int, wake: Callable[[], None]) -> None:
        """
        Args:
            spool: where built events wait to be sent.
            limit: bound of the drafts.
            wake: tells the link's thread that there is something to do.
        """
        self.spool = spool
        self._limit = limit
        self._wake = wake
        self._lock = threading.Lock()
        self._drafts: deque[Draft] = deque()
        self._seqs: dict[str, int] = {}
        self._lost: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._drafts)

    def put(self, draft: Draft) -> None:
        """Append a draft. Never waits for anything but another `put`."""
        with self._lock:
            if len(self._drafts) >= self._limit:
                self._make_room()
            self._drafts.append(draft)
        self._wake()

    def _make_room(self) -> None:
        for index, draft in enumerate(self._drafts):
            if draft.droppable:
                del self._drafts[index]
                self._count_lost(draft.run_id)
                return

    def _count_lost(self, run_id: str, count: int = 1) -> None:
        self._lost[run_id] = self._lost.get(run_id, 0) + count

    def next_ready(self) -> bool:
        """Whether the oldest draft can be moved on now."""
        return bool(self._drafts) and self._drafts[0].ready()

    def move_next(self) -> bool:
        """Build the oldest draft and write it to the spool. Only the link's thread calls this.

        Returns:
            Whether it should be sent at once.
        """
        with self._lock:
            draft = self._drafts.popleft()
            lost = self._lost.pop(draft.run_id, 0)
        if lost and self._seqs.get(draft.run_id, 0) > 0:
            self._report_lost(draft.run_id, lost)
            lost = 0
        seq = self._seqs.get(draft.run_id, 0)
        try:
            event = draft.build(seq)
        except Exception:
            log.exception("AttnScope: an event of run %s could not be built", draft.run_id)
            lost += 1
            event = None
        if event is not None:
            if seq == 0 and not isinstance(event, RunStarted):
                # Its RunStarted could not be built: the server knows nothing of this run.
                return False
            self._write(event)
        if lost and self._seqs.get(draft.run_id, 0) > 0:
            with self._lock:
                self._count_lost(draft.run_id, lost)
        return draft.urgent

    def flush_lost(self) -> None:
        """Report what was lost of runs that have nothing else to say."""
        with self._lock:
            lost, self._lost = self._lost, {}
        for run_id, count in lost.items():
            self._report_lost(run_id, count)

    def _report_lost(self, run_id: str, count: int) -> None:
        self._write(
            EventsLost(
                run_id=run_id,
                seq=self._seqs.get(run_id, 0),
                at=time.time(),
                count=count,
                reason="the bounded queue of unsent events was full, or an event was unusable",
            )
        )

    def _write(self, event: Event) -> None:
        self._seqs[event.run_id] = event.seq + 1
        data = event.model_dump_json().encode()
        kind: str = event.kind  # type: ignore[attr-defined]
        self.lose(self.spool.append(event.run_id, event.seq, kind, data))

    def lose(self, entries: Iterable[Entry]) -> None:
        """Count events that were dropped, to be reported with the run's next event."""
        with self._lock:
            for entry in entries:
                if entry.run_id in self._seqs:
                    self._count_lost(entry.run_id)

    def forget(self, active_runs: Iterable[str]) -> None:
        """Drop the numbering of runs that are over and fully sent."""
        keep = set(active_runs)
        with self._lock:
            keep.update(draft.run_id for draft in self._drafts)
            self._seqs = {run: seq for run, seq in self._seqs.items() if run in keep}
