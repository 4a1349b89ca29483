"""Child processes: installers that run to their end, and services that stay up."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import WINDOWS, Failure, explain, say

if TYPE_CHECKING:
    # Not evaluated: an old Python must get as far as being refused in plain words.
    Command = Sequence[str | os.PathLike[str]]


def install(
    command: Command,
    tool: str,
    log: Path,
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    news: Callable[[str], str | None] = lambda line: None,
) -> None:
    """Run an installer into a log; ``news`` picks what the user is shown meanwhile."""
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=400)
    with log.open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            for line in process.stdout or ():
                kept.write(line)
                last.append(line)
                if shown := news(line.strip()):
                    say(shown)
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
    if process.returncode != 0:
        raise explain("".join(last), tool, log)


def fetch_status(url: str, timeout: float = 2.0) -> int | None:
    """The HTTP status that a service on this machine answers with; None where none answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code
    except (OSError, ValueError):
        return None


class Service:
    """A server process with a log file, in a process group of its own.

    The group keeps the terminal's Ctrl+C from it: whoever started it stops it, in order.
    """

    def __init__(
        self,
        name: str,
        command: Command,
        *,
        log: Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=cwd,
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=not WINDOWS,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        atexit.register(self.stop)

    @property
    def exit_code(self) -> int | None:
        """None as long as it runs."""
        return self.process.poll()

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log, indented for a message."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])

    def check(self) -> None:
        """Fail with the end of its log if it has died."""
        if self.exit_code is not None:
            raise Failure(
                f"{self.name} ended with status {self.exit_code}; the last lines of "
                f"{self.log}:\n{self.tail()}"
            )

    def wait_for(self, url: str, seconds: float) -> None:
        """Wait until it answers HTTP at ``url``."""
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            status = fetch_status(url)
            if status is not None and status < 500:
                return
            if time.monotonic() > deadline:
                raise Failure(
                    f"{self.name} did not answer at {url} within {seconds:g} seconds; the last "
                    f"lines of {self.log}:\n{self.tail()}"
                )
            time.sleep(0.2)

    def stop(self, patience: float = 10.0) -> None:
        """Ask it to end, and end it where it does not listen. Harmless when it has ended."""
        atexit.unregister(self.stop)
        ctrl_c = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT) if WINDOWS else signal.SIGINT
        for ask, seconds in ((ctrl_c, patience), (signal.SIGTERM, 3.0)):
            if self.exit_code is not None:
                break
            with contextlib.suppress(OSError):
                self.process.send_signal(ask)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self._kill_group()
        self.process.wait()

    def _kill_group(self) -> None:
        """Nothing that it started may outlive it."""
        with contextlib.suppress(OSError):
            if WINDOWS:
                self.process.kill()
            else:
                os.killpg(self.process.pid, signal.SIGKILL)
