"""`make serve`: the server alone, for a ComfyUI that is already somewhere on this machine.

ATTNSCOPE_PORT chooses another port than 8420.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from page import ensure_page
from processes import Service
from setup import ensure_venv, venv_python
from toolkit import LOGS, ROOT, RUN, check_port, port_from_environment, start

DEFAULT_PORT = 8420


def server_port() -> int:
    """The server's port, seen to be free."""
    port = port_from_environment("ATTNSCOPE_PORT", DEFAULT_PORT)
    check_port(port, "ATTNSCOPE_PORT", "the AttnScope server")
    return port


def server_command(port: int, data_directory: Path) -> list[str]:
    """The command that serves the page and the API on this machine alone."""
    return [
        str(venv_python()), "-m", "attnscope.backend.cli", "serve",
        "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(data_directory),
    ]  # fmt: skip


def data_directory() -> Path:
    """Where the server keeps what it stores: ATTNSCOPE_DATA_DIR, or the checkout's own."""
    named = os.environ.get("ATTNSCOPE_DATA_DIR", "").strip()
    return Path(named).expanduser().resolve() if named else RUN / "data"


def start_server(port: int, *, data: Path | None = None, log: Path | None = None) -> Service:
    """Start the server and wait until it answers; it brings its database up to date itself."""
    service = Service(
        "the AttnScope server",
        server_command(port, data or data_directory()),
        log=log or LOGS / "server.log",
        cwd=ROOT,
    )
    try:
        service.wait_for(f"http://127.0.0.1:{port}/api/v1/health", 60.0)
    except BaseException:
        service.stop()
        raise
    return service


def main() -> int:
    port = server_port()
    ensure_venv("server")
    ensure_page()
    command = [*server_command(port, data_directory()), *sys.argv[1:]]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal has told the server too.
            return process.wait()


if __name__ == "__main__":
    start(main)
