"""The queue on disk and the numbering before it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from attnscope.comfy_plugin import spool as spools
from attnscope.comfy_plugin.outbox import Outbox
from attnscope.comfy_plugin.run import EventDraft
from attnscope.comfy_plugin.spool import Spool, left_over, owner_of_this_process
from attnscope.wire import RunEnded, RunStarted, SamplingInfo

RUN = "a" * 32
OWNER = {"pid": 2**22 + 3, "born": 1.0, "url": "http://there", "instance": {}}


def event(seq: int, kind: str = "step", run: str = RUN, size: int = 100) -> bytes:
    body = {"run_id": run, "seq": seq, "kind": kind, "text": ""}
    body["text"] = "x" * (size - len(json.dumps(body)))
    return json.dumps(body).encode()


def fill(spool: Spool, count: int, kind: str = "step") -> list[Any]:
    dropped = []
    for seq in range(count):
        dropped += spool.append(RUN, seq, kind, event(seq, kind))
    return dropped


def seqs(spool: Spool) -> list[int]:
    found = [entry.seq for entry in spool.head(10_000, 10**9)]
    spool.release()
    return found


def test_events_come_out_in_order_and_stay_until_they_are_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "q", OWNER, 10**6)
    fill(spool, 5)
    first = spool.head(2, 10**6)
    assert [entry.seq for entry in first] == [0, 1]
    assert [spool.data(entry) for entry in first] == [event(0), event(1)]
    assert [entry.seq for entry in spool.head(2, 10**6)] == [0, 1]
    spool.done(first)
    assert seqs(spool) == [2, 3, 4]
    assert [entry.seq for entry in spool.head(10, 250)] == [2, 3]
    assert [entry.seq for entry in spool.head(10, 1)] == [2]


def test_the_oldest_steps_go_first_and_a_run_s_frame_never(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "q", OWNER, 500)
    dropped = spool.append(RUN, 0, "run_started", event(0, "run_started"))
    for seq in range(1, 9):
        dropped += spool.append(RUN, seq, "step", event(seq))
    dropped += spool.append(RUN, 9, "run_ended", event(9, "run_ended"))
    assert [entry.seq for entry in dropped] == [1, 2, 3, 4, 5]
    assert seqs(spool) == [0, 6, 7, 8, 9]
    for seq in range(10, 20):
        spool.append(RUN, seq, "revision", event(seq, "revision"))
    assert seqs(spool) == [0, 9, *range(10, 20)]


def test_what_is_on_its_way_is_not_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "q", OWNER, 300)
    fill(spool, 3)
    sending = spool.head(2, 10**6)
    assert [entry.seq for entry in spool.append(RUN, 3, "step", event(3))] == [2]
    spool.done(sending)
    assert seqs(spool) == [3]
    fill(spool, 2)
    spool.head(2, 10**6)
    spool.release()
    assert [entry.seq for entry in spool.append(RUN, 9, "step", event(9))] == [3]


def test_a_crash_loses_no_whole_line(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    spool = Spool(folder, OWNER, 10**6)
    spool.append(RUN, 0, "run_started", event(0, "run_started"))
    for seq in range(1, 4):
        spool.append(RUN, seq, "step", event(seq))
    # Nothing is closed: the process just ends, in the middle of a line.
    with open(folder / "00000001.jsonl", "ab") as file:
        file.write(event(4)[:50])
    again = Spool(folder, OWNER, 10**6)
    again.load()
    assert seqs(again) == [0, 1, 2, 3]
    assert [again.data(entry) for entry in again.head(9, 10**6)][3] == event(3)
    assert again.start_of(RUN) == event(0, "run_started")
    again.append(RUN, 4, "step", event(4))
    third = Spool(folder, OWNER, 10**6)
    third.load()
    assert seqs(third) == [0, 1, 2, 3, 4]


def test_segments_go_when_everything_in_them_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "SEGMENT_BYTES", 300)
    spool = Spool(tmp_path / "q", OWNER, 10**6)
    fill(spool, 9)
    assert len(list((tmp_path / "q").glob("0*.jsonl"))) == 3
    spool.done(spool.head(4, 10**6))
    assert [path.name for path in sorted((tmp_path / "q").glob("0*.jsonl"))] == [
        "00000002.jsonl", "00000003.jsonl"
    ]  # fmt: skip
    spool.done(spool.head(9, 10**6))
    spool.close()
    assert not (tmp_path / "q").exists()
    fill(spool, 1)
    assert seqs(spool) == [0]


def test_events_are_read_back_from_disk_when_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "MEMORY_BYTES", 400)
    spool = Spool(tmp_path / "q", OWNER, 10**6)
    fill(spool, 10)
    entries = spool.head(10, 10**6)
    assert sum(entry.data is not None for entry in entries) < 6
    assert [spool.data(entry) for entry in entries] == [event(seq) for seq in range(10)]


def test_a_folder_that_can_not_be_written_leaves_the_queue_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    spool = Spool(tmp_path / "file" / "q", OWNER, 500)
    fill(spool, 8)
    assert seqs(spool) == [3, 4, 5, 6, 7]
    assert spool.data(spool.head(1, 1)[0]) == event(3)
    assert len(caplog.records) == 1


def test_only_ended_processes_leave_something_over(tmp_path: Path) -> None:
    mine = Spool(tmp_path / "mine", owner_of_this_process("http://there", {}), 10**6)
    dead = Spool(tmp_path / "dead", OWNER, 10**6)
    fill(mine, 1)
    fill(dead, 1)
    (tmp_path / "broken").mkdir()
    assert [folder for folder, _ in left_over(tmp_path, "http://there")] == [tmp_path / "dead"]
    assert left_over(tmp_path / "nowhere", "http://there") == []


class Note(EventDraft):
    """A draft with a name."""

    def __init__(self, run_id: str, kind: str, droppable: bool = False) -> None:
        makes = {
            "run_started": lambda seq: RunStarted(
                run_id=run_id, seq=seq, at=1.0, variant="exact", settings={},
                sampling=SamplingInfo(sigmas=[1.0, 0.0]),
            ),
            "run_ended": lambda seq: RunEnded(
                run_id=run_id, seq=seq, at=1.0, status="completed", duration_ms=1.0
            ),
        }  # fmt: skip
        super().__init__(run_id, makes.get(kind, self.fail))
        self.droppable = droppable
        self.urgent = True

    @staticmethod
    def fail(seq: int) -> Any:
        raise RuntimeError("can't be built")


def outbox(tmp_path: Path, limit: int = 100) -> Outbox:
    return Outbox(Spool(tmp_path / "q", OWNER, 10**6), limit, lambda: None)


def drain(box: Outbox) -> list[tuple[str, int]]:
    while len(box):
        assert box.next_ready()
        box.move_next()
    box.flush_lost()
    return [(entry.kind, entry.seq) for entry in box.spool.head(100, 10**9)]


def test_every_run_is_numbered_for_itself(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    for run in ("a", "b", "a", "b"):
        kind = "run_ended" if len(box) > 1 else "run_started"
        box.put(Note(run * 32, kind))
    assert drain(box) == [("run_started", 0)] * 2 + [("run_ended", 1)] * 2


def test_a_full_queue_drops_what_may_be_dropped_and_says_so(tmp_path: Path) -> None:
    box = outbox(tmp_path, limit=3)
    box.put(Note(RUN, "run_started"))
    for _ in range(4):
        box.put(Note(RUN, "run_ended", droppable=True))
    box.put(Note(RUN, "run_ended"))
    assert [kind for kind, _ in drain(box)] == [
        "run_started", "events_lost", "run_ended", "run_ended"
    ]  # fmt: skip
    lost = json.loads(box.spool.data(box.spool.head(9, 10**6)[1]))
    assert lost["count"] == 3


def test_what_can_not_be_built_is_counted(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    for kind in ("run_started", "nonsense", "run_ended"):
        box.put(Note(RUN, kind))
    assert drain(box) == [("run_started", 0), ("events_lost", 1), ("run_ended", 2)]


def test_a_run_whose_beginning_failed_sends_nothing(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.put(Note(RUN, "nonsense"))
    box.put(Note(RUN, "run_ended"))
    assert drain(box) == []


def test_putting_costs_microseconds(tmp_path: Path) -> None:
    box = outbox(tmp_path, limit=1000)
    draft = Note(RUN, "run_ended", droppable=True)
    times = []
    for _ in range(5000):
        start = time.perf_counter()
        box.put(draft)
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 50e-6
    assert len(box) == 1000
