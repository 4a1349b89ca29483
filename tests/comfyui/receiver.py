"""A server that only receives: it checks every batch against the wire and keeps the events."""

from __future__ import annotations

import gzip
import json
import queue
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from attnscope.wire import Batch

T = TypeVar("T")


def wait_for(ask: Callable[[], T | None], seconds: float = 20.0, what: str = "it") -> T:
    """Ask until the answer is truthy; AssertionError at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        answer = ask()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        threading.Event().wait(0.005)


class Receiver:
    """Stores like the real one: each ``(run_id, seq)`` once, the highest seq answered."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.batches: list[Batch] = []
        self.events: dict[str, dict[int, Any]] = {}
        self.order: list[tuple[str, int]] = []
        self.doubled: list[tuple[str, int]] = []
        self.authorization: list[str | None] = []
        self.refuse: Callable[[Batch], tuple[int, dict[str, Any]] | None] = lambda batch: None
        self.mailboxes: list[queue.Queue[str | None]] = []
        self.open_messages: list[str] = []
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Receiver:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; again on the same port after a `stop`."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                outer.take(self)

            def do_GET(self) -> None:
                outer.stream(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def process_request_thread(self, *args: Any) -> None:
                threading.current_thread().name = "receiver"
                super().process_request_thread(*args)

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="receiver", daemon=True
        ).start()

    def stop(self) -> None:
        """Go away: no new connections, and the open ones end."""
        server, self._server = self._server, None
        if server is None:
            return
        with self.lock:
            for box in self.mailboxes:
                box.put(None)
        server.shutdown()
        server.server_close()

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        if self._server is None:
            handler.close_connection = True
            return
        if handler.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        batch = Batch.model_validate_json(body)
        with self.lock:
            self.authorization.append(handler.headers.get("Authorization"))
            refusal = self.refuse(batch)
            if refusal is None:
                self.batches.append(batch)
                answer = 200, {"durable": self._store(batch)}
            else:
                answer = refusal
        self._answer(handler, *answer)

    def _store(self, batch: Batch) -> dict[str, int]:
        for event in batch.events:
            kept = self.events.setdefault(event.run_id, {})
            if event.seq in kept:
                self.doubled.append((event.run_id, event.seq))
            else:
                kept[event.seq] = event
                self.order.append((event.run_id, event.seq))
        return {event.run_id: max(self.events[event.run_id]) for event in batch.events}

    @staticmethod
    def _answer(handler: BaseHTTPRequestHandler, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def stream(self, handler: BaseHTTPRequestHandler) -> None:
        if not handler.path.endswith("/mailbox"):
            self._answer(handler, 404, {})
            return
        box: queue.Queue[str | None] = queue.Queue()
        with self.lock:
            for message in self.open_messages:
                box.put(message)
            self.mailboxes.append(box)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        try:
            while True:
                message = box.get()
                if message is None:
                    return
                handler.wfile.write(f"data: {message}\n\n".encode())
                handler.wfile.flush()
        except OSError:
            pass
        finally:
            with self.lock:
                self.mailboxes.remove(box)

    def push(self, message: Any) -> None:
        """Put a message into every connected mailbox; later connections get it too."""
        text = message.model_dump_json()
        with self.lock:
            self.open_messages.append(text)
            for box in self.mailboxes:
                box.put(text)

    def run(self, index: int = -1) -> list[Any]:
        """All events of a run, by seq; the newest run by default."""
        with self.lock:
            run_id = list(self.events)[index]
            return [event for _, event in sorted(self.events[run_id].items())]

    def finished(self, runs: int = 1, seconds: float = 60.0) -> list[Any]:
        """Wait until so many runs have ended; the newest one's events."""

        def ended() -> bool:
            with self.lock:
                return (
                    sum(
                        any(event.kind == "run_ended" for event in events.values())
                        for events in self.events.values()
                    )
                    >= runs
                )

        wait_for(ended, seconds, f"the end of run {runs}")
        return self.run()

    def steps(self, index: int = -1) -> list[Any]:
        return [event for event in self.run(index) if event.kind == "step"]
