"""What every tool here needs: paths, expected failures, stamps, ports, disk space.

The tools run under the bare system Python before any package is installed, so this folder's
modules import nothing but the standard library and each other.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".build"
RUN = ROOT / ".run"
LOGS = RUN / "logs"
WINDOWS = os.name == "nt"

OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)
# Any of these can start the tools where the virtual environment is there already.
OLDEST_TO_START = (3, 9)


class Failure(Exception):
    """A failure that was foreseen: its message is one sentence that says what to do."""


def say(message: str) -> None:
    """Tell the user where the tool has got to."""
    print(f"attnscope: {message}", flush=True)


def refuse(message: str) -> int:
    """Tell the user why nothing came of it; returns the exit status."""
    print(f"attnscope: {message}", file=sys.stderr, flush=True)
    return 1


def start(main: Callable[[], int]) -> None:
    """Run a tool's ``main`` as the program: foreseen failures become one line and status 1."""
    try:
        if sys.version_info < OLDEST_TO_START:
            check_python()
        status = main()
    except Failure as failure:
        status = refuse(str(failure))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            status = refuse("the disk is full: free some space and run again.")
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            status = refuse(
                f"{error.filename} may not be written: give yourself the right to (or work on a "
                "copy that you own) and run again."
            )
        else:
            raise
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> None:
    """Refuse an interpreter that the pinned packages do not support."""
    if not OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON:
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST_PYTHON, NEWEST_PYTHON))
        found = ".".join(map(str, version))
        raise Failure(
            f"Python {oldest} to {newest} is needed and this is {found}: install one of them and "
            "run again with it, for example `make run PYTHON=python3.12`."
        )


def check_disk(place: Path, needed_gb: float, what: str) -> None:
    """Refuse to begin what would fill the disk half-way."""
    while not place.exists():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / 1e9
    if free_gb < needed_gb:
        raise Failure(
            f"{what} needs about {needed_gb:g} GB of disk space and {place} has {free_gb:.1f} GB "
            "left: free some and run again."
        )


def port_from_environment(variable: str, default: int) -> int:
    """The port that the user chose, or the default."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise Failure(f"{variable} is {text!r}: set it to a port number from 1 to 65535.")
    return int(text)


def check_port(port: int, variable: str, what: str) -> None:
    """Refuse a port that another program holds, before anything long has begun."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if not WINDOWS:
            # As the servers do it, so that a port in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise Failure(
                f"port {port}, which {what} is to use, is taken or not allowed: stop the program "
                f"that holds it or choose another with {variable}=<port>."
            ) from None


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def digest(parts: Iterable[str | Path], base: Path = ROOT) -> str:
    """One hash over texts and over the names and contents of files."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            name = part.relative_to(base) if part.is_relative_to(base) else part
            total.update(f"file {name.as_posix()}\0".encode())
            total.update(part.read_bytes() if part.is_file() else b"absent")
        else:
            total.update(f"text {part}".encode())
        total.update(b"\0")
    return total.hexdigest()


def files_below(folder: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    """Every file of a folder in a fixed order, leaving out folders and files by name."""
    skipped = frozenset(skip)
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skipped)
        yield from (Path(place, name) for name in sorted(names) if name not in skipped)


class Stamp:
    """Remembers what a step was last done for, so that it is done again only on a change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def matches(self, wanted: str) -> bool:
        """Whether the step was last completed for exactly this."""
        try:
            return self.path.read_text(encoding="utf-8") == wanted
        except OSError:
            return False

    def clear(self) -> None:
        """Forget it: called before the step begins, so that a broken one is not trusted."""
        self.path.unlink(missing_ok=True)

    def write(self, done: str) -> None:
        """Remember it: called when the step has ended well."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(done, encoding="utf-8")


def link_folder(link: Path, target: Path) -> None:
    """Make ``link`` show another folder without copying it."""
    if link.exists() and link.resolve() == target.resolve():
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    elif os.path.lexists(link):
        try:
            link.rmdir()  # a junction, or an empty folder: a full one is refused
        except OSError:
            raise Failure(f"{link} is in the way of a link: move it and run again.") from None
    if sys.platform == "win32":
        import _winapi  # only there; and unlike a symbolic link, a junction needs no privilege

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


DISK_FULL = ("no space left on device", "enospc", "errno 28", "not enough space on the disk")
NETWORK_DOWN = (
    "failed to establish a new connection",
    "name resolution",
    "getaddrinfo",
    "name or service not known",
    "network is unreachable",
    "connection refused",
    "connecttimeout",
    "read timed out",
    "proxyerror",
    "cannot connect to proxy",
    "certificate verify failed",
    "eai_again",
    "enotfound",
    "econnrefused",
    "econnreset",
    "etimedout",
    "enetunreach",
)


ERROR_LINE = re.compile(
    r"^\s*(?:npm error|ERROR:|error:|\w*Error:) +"
    r"(?!code |A complete log|subprocess-exited)(\S.*)$",
    re.MULTILINE,
)


def explain(output: str, tool: str, log: Path) -> Failure:
    """Turn an installer's failed output into the one sentence that helps."""
    lowered = output.lower()
    where = log.relative_to(ROOT) if log.is_relative_to(ROOT) else log
    if any(mark in lowered for mark in DISK_FULL):
        return Failure(f"the disk is full: free some space and run again ({tool}'s log: {where}).")
    if any(mark in lowered for mark in NETWORK_DOWN):
        return Failure(
            f"{tool} could not reach its package index: check the network, or {tool}'s proxy and "
            f"index settings, and run again ({tool}'s log: {where})."
        )
    errors = ERROR_LINE.findall(output) or output.strip().splitlines()[-1:]
    # pip ends with the error that counts; npm begins with it and goes on to explain itself.
    told = (errors[0] if tool == "npm" else errors[-1]) if errors else "no message"
    return Failure(f"{tool} failed with «{told}»: see {where}, and run again when it is mended.")
