"""What was acknowledged survives, what is too large is refused, what is locked says so."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.events import RunScript, batch_json, instance
from support.server import ServerProcess


def test_acknowledged_events_survive_sigkill(server: ServerProcess) -> None:
    of, script = instance(), RunScript(layers=20, steps=1000)
    events: list[Any] = [script.started(), *(script.step(step) for step in range(300))]
    acknowledged = 0
    stop = threading.Event()

    def write() -> None:
        nonlocal acknowledged
        for event in events:
            try:
                answer = httpx.post(f"{server.api}/ingest", content=batch_json(of, event))
            except httpx.TransportError:
                return
            acknowledged = answer.json()["durable"][script.run_id]
            if acknowledged >= 20:
                stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert stop.wait(60)
    server.kill()
    writer.join()
    server.start()
    run = httpx.get(f"{server.api}/runs/{script.run_id}").json()
    assert run["steps_done"] >= acknowledged
    # sending everything again adds only what is missing
    for begin in range(0, len(events), 100):
        data = batch_json(of, *events[begin : begin + 100])
        assert httpx.post(f"{server.api}/ingest", content=data, timeout=30).status_code == 200
    run = httpx.get(f"{server.api}/runs/{script.run_id}").json()
    assert run["steps_done"] == 300
    steps = httpx.get(f"{server.api}/runs/{script.run_id}/steps").json()["items"]
    assert [step["step"] for step in steps] == list(range(300))


def memory(server: ServerProcess) -> int:
    assert server.process is not None
    return int(psutil.Process(server.process.pid).memory_info().rss)


def test_a_hundred_megabytes_are_refused_early(server: ServerProcess) -> None:
    before = memory(server)

    def chunks() -> Any:
        for _ in range(100):
            yield bytes(1_000_000)

    try:
        response = httpx.post(f"{server.api}/ingest", content=chunks(), timeout=30)
        assert response.status_code == 413
    except httpx.WriteError:
        pass  # the server has hung up on the rest
    announced = "Content-Length: 100000000\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        head = f"POST /api/v1/ingest HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{announced}\r\n"
        begin = time.monotonic()
        client.sendall(head.encode())
        answer = client.recv(65536)
        assert b" 413 " in answer.split(b"\r\n")[0], "before a byte of the body was sent"
        assert time.monotonic() - begin < 1.5
    assert memory(server) - before < 60_000_000
    assert httpx.get(f"{server.api}/health").status_code == 200


def test_a_packed_bomb_is_refused_early(server: ServerProcess) -> None:
    bomb = _bomb(400)
    before = memory(server)
    headers = {"content-encoding": "gzip"}
    response = httpx.post(f"{server.api}/ingest", content=bomb, headers=headers, timeout=60)
    assert response.status_code == 413
    assert memory(server) - before < 200_000_000


def _bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(megabytes)) + packer.flush()


def test_a_locked_database_is_answered_with_503(make_api: Any) -> None:
    api = make_api(busy_timeout=0.1)
    script = RunScript(layers=1)
    api.send(script.started())
    other = sqlite3.connect(api.services.config.data_dir / "attnscope.db")
    other.execute("BEGIN IMMEDIATE")
    try:
        response = api.post(script.step(0))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["type"] == "busy"
        assert api.get(f"/runs/{script.run_id}")["steps_done"] == 0, "reading goes on"
    finally:
        other.rollback()
        other.close()
    api.send(script.step(0))
    assert api.get(f"/runs/{script.run_id}")["steps_done"] == 1


def test_a_short_lock_is_waited_for(api: Any) -> None:
    script = RunScript(layers=1)
    api.send(script.started())
    other = sqlite3.connect(api.services.config.data_dir / "attnscope.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.rollback)
    release.start()
    api.send(script.step(0))
    release.join()
    other.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(28, "No space left on device"), 507), (OSError(5, "I/O error"), 500)],
)
def test_a_full_disk_says_so(make_api: Any, monkeypatch: Any, error: OSError, status: int) -> None:
    api = make_api(raise_errors=False)
    script = RunScript(layers=1)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(type(api.services.images), "save", fail)
    items = [script.started(), script.image()]
    response = api.post(*items)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert "Traceback" not in response.text
    assert api.get("/runs")["total"] == 0
    monkeypatch.undo()
    api.send(*items)
    assert api.get(f"/runs/{script.run_id}")["preview"]


def test_a_full_database_says_so(make_api: Any) -> None:
    api = make_api(raise_errors=False)
    script = RunScript(layers=57)
    api.send(script.started())
    from sqlalchemy import event

    @event.listens_for(api.services.store.writer, "begin")
    def _limit(connection: Any) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 1}")

    response = api.post(*(script.step(step) for step in range(50)))
    assert response.status_code == 507
    assert response.json()["type"] == "out-of-storage"
    assert api.get(f"/runs/{script.run_id}")["steps_done"] == 0


def test_half_written_images_are_cleared_away(make_api: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "images" / "ab"
    folder.mkdir(parents=True)
    (folder / "abc.123.part").write_bytes(b"half")
    make_api()
    assert list(folder.iterdir()) == []
