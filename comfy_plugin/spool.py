"""Events that the server doesn't have yet, in order, on disk and bounded.

Each event is one line of JSON in a segment file, written when the event is made and gone with its
segment once the server has stored everything in it. After a crash the lines that remain are sent
again, which the server recognises by ``(run_id, seq)``; a half-written last line is left out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger("attnscope")

SEGMENT_BYTES = 4 * 2**20
MEMORY_BYTES = 16 * 2**20
"""Newest events are also kept in memory up to this many bytes, so that sending reads no file."""

DROPPABLE = frozenset({"step", "image"})
"""Kinds that may be dropped where space runs out; the others tell of a run as a whole."""

_OWNER = "owner.json"
_STARTS = "starts.jsonl"


@dataclass(slots=True, eq=False)
class Entry:
    """An event that waits to be sent."""

    run_id: str
    seq: int
    kind: str
    size: int
    data: bytes | None
    segment: _Segment | None = None
    offset: int = 0


class _Segment:
    """One file of lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = 0
        self.size = 0
        self.full = False
        self._file: BinaryIO | None = None

    def append(self, data: bytes) -> int:
        """Write a line; answers its offset."""
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives with the segment
            self.size = self._file.tell()
        offset = self.size
        line = data + b"\n"
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written")
        self.size += len(line)
        return offset

    def read(self, offset: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def delete(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


class Spool:
    """A bounded queue of events. Used by one thread."""

    def __init__(self, folder: Path | None, owner: dict[str, Any], limit_bytes: int) -> None:
        """
        Args:
            folder: of this queue alone; None, or one that can't be written, keeps the queue in
                memory, within the same bound.
            owner: what another process needs to know to take the queue over.
            limit_bytes: bound of the waiting events together.
        """
        self._folder = folder
        self._owner = owner
        self._limit = limit_bytes
        self._entries: list[Entry] = []
        self._first = 0
        self._guarded = 0
        self._bytes = 0
        self._memory = 0
        self._segments: list[_Segment] = []
        self._number = 0
        self._starts: dict[str, bytes] = {}
        self._opened = False

    def __len__(self) -> int:
        return len(self._entries) - self._first

    @property
    def folder(self) -> Path | None:
        """Where the queue lies; None while it is in memory only."""
        return self._folder

    def load(self) -> None:
        """Take over what an ended process left in the folder."""
        if self._folder is None:
            return
        for path in sorted(self._folder.glob("*.jsonl")):
            if path.name == _STARTS:
                for data, event in _lines(path):
                    self._starts.setdefault(event["run_id"], data)
                continue
            segment = _Segment(path)
            offset = 0
            for data, event in _lines(path):
                entry = Entry(
                    event["run_id"], event["seq"], event["kind"], len(data), None, segment, offset
                )
                offset += len(data) + 1
                self._entries.append(entry)
                self._bytes += entry.size
                segment.waiting += 1
            # Its last line may be half a line: nothing is written behind it.
            segment.full = True
            self._segments.append(segment)
            self._number = max(self._number, _number(path))
        self._opened = True

    def append(self, run_id: str, seq: int, kind: str, data: bytes) -> list[Entry]:
        """Add an event at the end.

        Args:
            run_id: of the event.
            seq: of the event.
            kind: of the event.
            data: the event's JSON, without line breaks.

        Returns:
            Events that had to be dropped to stay within the bound.
        """
        entry = Entry(run_id, seq, kind, len(data), data)
        self._write(entry, data)
        self._entries.append(entry)
        self._bytes += entry.size
        self._memory += entry.size
        if kind == "run_started":
            self._remember_start(run_id, data)
        if self._folder is not None and self._memory > MEMORY_BYTES:
            self._free_memory()
        return self._shrink()

    def head(self, count: int, size: int) -> list[Entry]:
        """The oldest events, at least one if there is any.

        They stay until `done`, and are never dropped before `done` or `release`.

        Args:
            count: at most so many.
            size: at most so many bytes together, but for a single larger event.
        """
        chosen: list[Entry] = []
        total = 0
        for entry in self._entries[self._first : self._first + count]:
            total += entry.size
            if chosen and total > size:
                break
            chosen.append(entry)
        self._guarded = len(chosen)
        return chosen

    def data(self, entry: Entry) -> bytes:
        """The event's JSON.

        Raises:
            OSError: its file is gone or can't be read.
        """
        if entry.data is not None:
            return entry.data
        if entry.segment is None:
            raise OSError("the event was kept nowhere")
        data = entry.segment.read(entry.offset, entry.size)
        if len(data) != entry.size:
            raise OSError(f"{entry.segment.path} is shorter than it was")
        return data

    def done(self, entries: Iterable[Entry]) -> None:
        """The server has these: forget them."""
        gone = set(map(id, entries))
        if not gone:
            return
        kept = []
        for entry in self._entries[self._first :]:
            if id(entry) in gone:
                self._forget(entry)
            else:
                kept.append(entry)
        self._entries, self._first = kept, 0
        self._guarded = 0
        self._sweep()

    def release(self) -> None:
        """What `head` gave isn't on its way any more: it may be dropped like the rest."""
        self._guarded = 0

    def start_of(self, run_id: str) -> bytes | None:
        """The run's `RunStarted`, for a server that has lost it."""
        return self._starts.get(run_id)

    def close(self, active_runs: Iterable[str] = ()) -> None:
        """Close the files; an empty queue leaves nothing on disk unless a run is active."""
        for segment in self._segments:
            segment.close()
        active = set(active_runs)
        if len(self) == 0 and not active:
            self._segments.clear()
            self._starts.clear()
            self._opened = False
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, entry: Entry, data: bytes) -> None:
        if self._folder is None:
            return
        try:
            self._open()
            segment = self._segments[-1] if self._segments else None
            if segment is None or segment.full or segment.size >= SEGMENT_BYTES:
                if segment is not None:
                    segment.close()
                self._number += 1
                segment = _Segment(self._folder / f"{self._number:08d}.jsonl")
                self._segments.append(segment)
            entry.offset = segment.append(data)
            entry.segment = segment
            segment.waiting += 1
        except OSError as error:
            log.warning(
                "AttnScope: can't write to %s (%s); unsent events are kept in memory only",
                self._folder, error,
            )  # fmt: skip
            self._folder = None

    def _open(self) -> None:
        if self._opened or self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / _OWNER).write_text(json.dumps(self._owner), encoding="utf-8")
        self._opened = True

    def _remember_start(self, run_id: str, data: bytes) -> None:
        self._starts[run_id] = data
        if self._folder is None:
            return
        with contextlib.suppress(OSError), open(self._folder / _STARTS, "ab") as file:
            file.write(data + b"\n")

    def _free_memory(self) -> None:
        for entry in self._entries[self._first :]:
            if self._memory <= MEMORY_BYTES // 2:
                break
            if entry.data is not None and entry.segment is not None:
                entry.data = None
                self._memory -= entry.size

    def _shrink(self) -> list[Entry]:
        dropped: list[Entry] = []
        index = self._first + self._guarded
        while self._bytes > self._limit and index < len(self._entries):
            if self._entries[index].kind in DROPPABLE:
                dropped.append(self._entries.pop(index))
                self._forget(dropped[-1])
            else:
                index += 1
        if dropped:
            self._sweep()
        return dropped

    def _forget(self, entry: Entry) -> None:
        self._bytes -= entry.size
        if entry.data is not None:
            self._memory -= entry.size
        if entry.segment is not None:
            entry.segment.waiting -= 1

    def _sweep(self) -> None:
        for segment in self._segments[:-1]:
            if segment.waiting == 0:
                segment.delete()
        self._segments = [s for s in self._segments[:-1] if s.waiting] + self._segments[-1:]


def _lines(path: Path) -> Iterable[tuple[bytes, dict[str, Any]]]:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            data = line[:-1]
            try:
                event = json.loads(data)
                if not (isinstance(event["run_id"], str) and isinstance(event["seq"], int)):
                    return
                event["kind"] = str(event["kind"])
            except (ValueError, KeyError, TypeError):
                # Offsets count whole lines, so nothing behind a broken one can be trusted.
                return
            yield data, event


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() else 0


def left_over(root: Path, url: str) -> list[tuple[Path, dict[str, Any]]]:
    """Queues for a server that processes which have ended left below ``root``, oldest first."""
    found = []
    with contextlib.suppress(OSError):
        for folder in sorted(root.iterdir(), key=lambda path: path.stat().st_mtime):
            try:
                owner = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
                if owner["url"] == url and not _alive(owner):
                    found.append((folder, owner))
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


def owner_of_this_process(url: str, instance: dict[str, Any]) -> dict[str, Any]:
    """What `left_over` reads: whose queue it is, and for which server."""
    return {"pid": os.getpid(), "born": _born(os.getpid()), "url": url, "instance": instance}


def _born(pid: int) -> float | None:
    try:
        import psutil

        return float(psutil.Process(pid).create_time())
    except Exception:
        return None


def _alive(owner: dict[str, Any]) -> bool:
    pid = int(owner["pid"])
    if pid == os.getpid():
        # Also after a restart that got the same number, as in a container.
        return owner.get("born") == _born(pid)
    born = _born(pid)
    return born is not None and born == owner.get("born")
