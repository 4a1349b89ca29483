"""A real server as a process of its own, for tests that need one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

Result = TypeVar("Result")

START_SECONDS = 90.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Result | None], what: str, seconds: float = 20.0) -> Result:
    """Wait until a condition gives something true.

    Raises:
        AssertionError: it did not within the time.
    """
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


class ServerProcess:
    """``attnscope serve`` on a free port; use it as a context.

    Args:
        data_dir: folder of database and images.
        environ: further environment variables.
    """

    def __init__(self, data_dir: Path, environ: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.environ = environ or {}
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.log = data_dir.parent / f"{data_dir.name}.server.log"

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        """Address of the API."""
        return f"{self.url}/api/v1"

    def start(self) -> ServerProcess:
        """Start it and wait until it answers."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("ATTNSCOPE_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "attnscope.backend.cli",
                    "serve",
                    "--port",
                    str(self.port),
                    "--data-dir",
                    str(self.data_dir),
                ],
                stdout=log,
                stderr=log,
                env={**environ, **self.environ},
            )
        try:
            wait_until(self._answers, "the server answers", START_SECONDS)
        except AssertionError as error:
            self.stop(signal.SIGKILL)
            raise AssertionError(f"{error}; its log:\n{self.log_text()}") from None
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"server ended at once:\n{self.log_text()}")
        try:
            return httpx.get(f"{self.api}/health", timeout=1.0).status_code == 200
        except httpx.TransportError:
            return False

    def log_text(self) -> str:
        """What the server has said."""
        return self.log.read_text() if self.log.exists() else ""

    def stop(self, sig: int = signal.SIGTERM, seconds: float = 10.0) -> float:
        """Send a signal and wait for the end.

        Returns:
            Seconds until it had ended.
        """
        assert self.process is not None
        begin = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        self.process.wait(seconds)
        self.process = None
        return time.monotonic() - begin

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self.stop(signal.SIGKILL)

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        if self.process is not None:
            self.stop(signal.SIGKILL)
