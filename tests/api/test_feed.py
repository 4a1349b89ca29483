"""The change feed: in order, without gap or duplicate, whoever reads at whatever pace."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.events import NAN, RunScript, batch_json, instance
from support.server import ServerProcess, wait_until

from attnscope.backend import feed


def send(server: ServerProcess, of: Any, *items: Any) -> Any:
    response = httpx.post(f"{server.api}/ingest", content=batch_json(of, *items), timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


class Reader:
    """Reads a stream in a thread of its own, as an EventSource would."""

    def __init__(self, url: str, **params: Any) -> None:
        self.url = url
        self.params = params
        self.items: list[Any] = []
        self.ids: list[int] = []
        self.names: list[str] = []
        self.pings = 0
        self.ended = threading.Event()
        self.connected = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with httpx.stream("GET", self.url, timeout=60, **self.params) as response:
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    self.connected.set()
                    if self._stop.is_set():
                        return
                    self._take(line)
        except httpx.TransportError:
            pass
        finally:
            self.ended.set()

    def _take(self, line: str) -> None:
        if line.startswith(": ping"):
            self.pings += 1
        elif line.startswith("event: "):
            self.names.append(line.removeprefix("event: "))
        elif line.startswith("data: "):
            self.items.append(json.loads(line.removeprefix("data: ")))
        elif line.startswith("id: "):
            self.ids.append(int(line.removeprefix("id: ")))

    def start(self) -> Reader:
        self._thread.start()
        assert self.connected.wait(20), "the stream says something at once"
        return self

    def stop(self) -> None:
        self._stop.set()

    def until(self, seq: int) -> None:
        wait_until(lambda: self.ids and self.ids[-1] >= seq, f"change {seq}; has {self.ids[-3:]}")


@contextmanager
def reading(url: str, **params: Any) -> Iterator[Reader]:
    reader = Reader(url, **params).start()
    try:
        yield reader
    finally:
        reader.stop()


def test_changes_as_json(api: Any) -> None:
    script = RunScript(layers=2, steps=2)
    api.send(*script.whole())
    answer = api.get("/changes")
    kinds = [item["kind"] for item in answer["items"]]
    assert kinds == ["instance", "run", "revision", "step", "image", "step", "image", "image"]
    seqs = [item["seq"] for item in answer["items"]]
    assert seqs == sorted(set(seqs))
    assert answer["latest_seq"] == seqs[-1]
    assert answer["more"] is False
    run = answer["items"][1]
    assert run["data"] == api.get(f"/runs/{script.run_id}"), "its present state"
    step = answer["items"][3]["data"]
    assert step["step"] == api.get(f"/runs/{script.run_id}/steps")["items"][0]
    assert step["layers"] == script.layers
    assert answer["items"][4]["data"]["run_id"] == script.run_id
    page = api.get("/changes", after=seqs[2], limit=2)
    assert [item["seq"] for item in page["items"]] == seqs[3:5]
    assert page["more"] is True


def test_a_newer_change_supersedes_the_older_one(api: Any) -> None:
    script, other = RunScript(layers=1), RunScript(layers=1)
    api.send(script.started(), other.started())
    for step in range(3):
        api.send(script.step(step))
    items = api.get("/changes", run_id=script.run_id)["items"]
    kinds = [item["kind"] for item in items]
    assert kinds == ["revision", "step", "step", "run", "step"]
    assert {item["run_id"] for item in items} == {script.run_id}
    assert items[3]["data"]["steps_done"] == 3


def test_a_position_of_another_database_is_refused(api: Any) -> None:
    assert api.problem("GET", "/changes", 409, params={"after": 5})["type"] == "feed-reset"
    assert api.problem("GET", "/stream", 409, params={"after": 5})["type"] == "feed-reset"
    headers = {"last-event-id": "x"}
    assert api.problem("GET", "/stream", 422, headers=headers)


def test_a_stream_carries_what_comes(server: ServerProcess) -> None:
    of, script = instance(), RunScript(layers=3, steps=3)
    with reading(f"{server.api}/stream") as reader:
        send(server, of, script.started())
        send(server, of, script.step(0, nmse=[NAN, 0.1, None]))
        send(server, of, script.step(1), script.ended())
        latest = httpx.get(f"{server.api}/health").json()["latest_seq"]
        reader.until(latest)
        assert reader.ids == sorted(set(reader.ids))
        assert [item["seq"] for item in reader.items] == reader.ids
        assert [item["kind"] for item in reader.items] == reader.names
        steps = [item["data"] for item in reader.items if item["kind"] == "step"]
        assert [step["step"]["step"] for step in steps] == [0, 1]
        assert steps[0]["metrics"]["nmse"] == ["NaN", 0.1, None]
        # what is read later is the same
        later = httpx.get(f"{server.api}/changes").json()["items"]
        assert [i for i in later if i["kind"] == "step"] == [
            i for i in reader.items if i["kind"] == "step"
        ]


def test_a_reader_that_returns_misses_nothing_and_gets_nothing_twice(
    server: ServerProcess, tmp_path: Path
) -> None:
    of, script = instance(), RunScript(layers=2, steps=60)
    send(server, of, script.started())
    seen: list[int] = []
    position = 0
    for part in range(4):
        headers = {"last-event-id": str(position)}
        with reading(f"{server.api}/stream", headers=headers) as reader:
            for step in range(part * 10, part * 10 + 10):
                send(server, of, script.step(step))
            # leaves in the middle of things
            wait_until(lambda r=reader: len(r.items) >= 5, "some changes")
            items = list(reader.items)
        seen += [i["data"]["step"]["step"] for i in items if i["kind"] == "step"]
        position = items[-1]["seq"]
        if part == 1:
            server.kill()
            server.start()
    with reading(f"{server.api}/stream", params={"after": position}) as reader:
        latest = httpx.get(f"{server.api}/health").json()["latest_seq"]
        if latest > position:
            reader.until(latest)
        seen += [i["data"]["step"]["step"] for i in reader.items if i["kind"] == "step"]
    assert seen == list(range(40))


def test_columns_and_stream_fit_together(server: ServerProcess) -> None:
    of, script = instance(), RunScript(layers=2, steps=40)
    send(server, of, script.started())
    events = [script.step(step) for step in range(40)]
    writing = threading.Thread(target=lambda: [send(server, of, event) for event in events])
    writing.start()
    columns = httpx.get(f"{server.api}/runs/{script.run_id}/columns").json()
    params = {"after": columns["seq"], "run_id": script.run_id}
    with reading(f"{server.api}/stream", params=params) as reader:
        writing.join()
        wait_until(
            lambda: (
                len(columns["steps"]["step"])
                + sum(1 for item in list(reader.items) if item["kind"] == "step")
                >= 40
            ),
            "all steps",
        )
        streamed = [i["data"]["step"]["step"] for i in reader.items if i["kind"] == "step"]
    assert columns["steps"]["step"] + streamed == list(range(40))


def test_many_readers_share_and_a_stuck_one_holds_up_nobody(server: ServerProcess) -> None:
    of, script = instance(), RunScript(layers=57, steps=300)
    stuck = socket.create_connection(("127.0.0.1", server.port))
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131072)
    stuck.sendall(
        f"GET /api/v1/stream?after=0 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
    )
    send(server, of, script.started())
    readers = [Reader(f"{server.api}/stream", params={"after": 0}).start() for _ in range(5)]
    for begin in range(0, 300, 50):
        send(server, of, *(script.step(step) for step in range(begin, begin + 50)))
    latest = httpx.get(f"{server.api}/health").json()["latest_seq"]
    for reader in readers:
        reader.until(latest)
        steps = [i["data"]["step"]["step"] for i in reader.items if i["kind"] == "step"]
        assert steps == list(range(300))
        reader.stop()
    # the stuck reader still gets everything when it reads on
    data = b""
    stuck.settimeout(20)
    while f"id: {latest}\n".encode() not in data[-200_000:]:
        chunk = stuck.recv(1 << 20)
        assert chunk
        data += chunk
    assert data.count(b"event: step\n") == 300
    stuck.close()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_open_streams_do_not_hold_up_the_end(server: ServerProcess, sig: int) -> None:
    of, script = instance(), RunScript(layers=2)
    send(server, of, script.started())
    mailbox = f"{server.api}/instances/{of.instance_id}/mailbox"
    readers = [Reader(f"{server.api}/stream").start() for _ in range(3)]
    readers.append(Reader(mailbox).start())
    seconds = server.stop(sig)
    assert seconds < 3.0
    for reader in readers:
        assert reader.ended.wait(5)
    assert "Traceback" not in server.log_text()


def test_a_quiet_stream_is_pinged(tmp_path: Path) -> None:
    environ = {"ATTNSCOPE_PING_EVERY": "0.1"}
    with (
        ServerProcess(tmp_path / "data", environ) as server,
        reading(f"{server.api}/stream") as reader,
    ):
        wait_until(lambda: reader.pings >= 3, "pings")
        assert reader.items == []


def test_what_another_process_writes_is_streamed_too(tmp_path: Path, make_api: Any) -> None:
    from attnscope.backend import exporting, importing

    source = make_api("source")
    source.send(*RunScript(layers=2, steps=2, at=1000.0).whole())
    exporting.export_file(source.services.config, tmp_path / "runs")
    environ = {"ATTNSCOPE_SWEEP_EVERY": "0.1"}
    with (
        ServerProcess(tmp_path / "data", environ) as server,
        reading(f"{server.api}/stream") as reader,
    ):
        from attnscope.backend.config import Config

        importing.import_file(Config(data_dir=tmp_path / "data"), tmp_path / "runs")
        latest = httpx.get(f"{server.api}/health").json()["latest_seq"]
        reader.until(latest)
        assert {item["kind"] for item in reader.items} >= {"run", "step", "image"}


def test_a_mailbox_from_push_to_plugin(server: ServerProcess) -> None:
    of, script = instance(), RunScript(layers=2)
    send(server, of, script.started())
    run_url = f"{server.api}/runs/{script.run_id}"
    box = f"{server.api}/instances/{of.instance_id}"
    first = httpx.put(
        f"{run_url}/settings", json={"base_revision": 0, "settings": {"P": 5}}
    ).json()
    assert httpx.get(box).json()["online"] is False
    with reading(f"{box}/mailbox") as reader:
        wait_until(lambda: reader.items, "the open revision")
        assert reader.items[0]["id"] == first["id"] == reader.ids[0]
        assert reader.items[0]["settings"]["P"] == 5
        assert reader.names == ["revision"]
        wait_until(lambda: httpx.get(box).json()["online"], "online")
        second = httpx.put(
            f"{run_url}/settings", json={"base_revision": 1, "settings": {"P": 4}}
        ).json()
        wait_until(lambda: len(reader.items) == 2, "the new revision")
        assert reader.ids == [first["id"], second["id"]]
        httpx.post(f"{run_url}/interrupt")
        wait_until(lambda: reader.names[-1] == "interrupt", "the interrupt")
        reader.stop()
        # something must arrive for the client to notice that it has been told to stop
        httpx.put(f"{box}/settings/taylor", json={"settings": {"P": 2}})
    wait_until(lambda: not httpx.get(box).json()["online"], "offline at once")
    with reading(f"{box}/mailbox") as reader:
        wait_until(lambda: len(reader.items) == 3, "every open message again")
        assert {item["kind"] for item in reader.items} == {
            "revision", "interrupt", "instance_settings",
        }  # fmt: skip


def test_the_window_forgets_the_oldest_and_readers_behind_it_still_get_them(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = feed.Feed()
    monkeypatch.setattr(feed, "WINDOW_ITEMS", 3)
    window._keep([feed.Item(seq, None, b"x" * 10) for seq in range(1, 6)])
    assert [item.seq for item in window._window] == [3, 4, 5]
    assert window._low == 2
    assert window._window_bytes == 30
    monkeypatch.setattr(feed, "WINDOW_BYTES", 15)
    window._keep([feed.Item(6, None, b"y" * 10)])
    assert [item.seq for item in window._window] == [6]
    assert window._low == 5


def test_presence_is_on_the_feed(server: ServerProcess) -> None:
    of = instance()
    send(server, of)
    box = f"{server.api}/instances/{of.instance_id}/mailbox"
    with reading(f"{server.api}/stream") as changes, reading(box):
        wait_until(lambda: changes.items, "coming")
        assert changes.items[-1]["data"]["online"] is True
