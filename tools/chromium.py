"""Finds a Chromium for the browser tests: CHROMIUM, an installed one, or Debian's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from toolkit import WINDOWS, Failure, say, start

NAMES = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
    "microsoft-edge", "msedge",
)  # fmt: skip

MAC_APPLICATIONS = (
    "Google Chrome.app/Contents/MacOS/Google Chrome",
    "Chromium.app/Contents/MacOS/Chromium",
    "Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)

WINDOWS_PROGRAMS = (
    "Google/Chrome/Application/chrome.exe",
    "Chromium/Application/chrome.exe",
    "Microsoft/Edge/Application/msedge.exe",
)


def playwright_folder() -> Path:
    """Where `playwright install` puts its browsers."""
    named = os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "")
    if named and named != "0":
        return Path(named)
    if WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "ms-playwright"
    caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return caches / "ms-playwright"


def candidates() -> Iterator[Path]:
    """Every place worth a look, best first."""
    for name in NAMES:
        if found := shutil.which(name):
            yield Path(found)
    if sys.platform == "darwin":
        for folder in (Path("/Applications"), Path.home() / "Applications"):
            yield from (folder / application for application in MAC_APPLICATIONS)
    if WINDOWS:
        for variable in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
            if base := os.environ.get(variable):
                yield from (Path(base) / program for program in WINDOWS_PROGRAMS)
    for pattern in (
        "chrome-linux*/chrome",
        "chrome-win*/chrome.exe",
        "chrome-mac*/*.app/Contents/MacOS/*",
    ):
        yield from sorted(playwright_folder().glob(f"chromium-*/{pattern}"), reverse=True)


def installed_chromium() -> Path | None:
    """A Chromium that is there; CHROMIUM, where set, must name one."""
    named = os.environ.get("CHROMIUM", "").strip()
    if named:
        found = shutil.which(str(Path(named).expanduser()))
        if found is None:
            raise Failure(
                f"CHROMIUM is {named!r}, which is no program: set it to a Chromium or Chrome, or "
                "unset it to have one looked for."
            )
        return Path(found)
    return next((path for path in candidates() if path.is_file()), None)


def can_use_apt() -> bool:
    """Whether this is a Debian where this user may install packages."""
    return (
        Path("/etc/debian_version").is_file()
        and shutil.which("apt-get") is not None
        and getattr(os, "geteuid", lambda: 1)() == 0
    )


def apt_install() -> bool:
    """Install Debian's Chromium; True when that went well."""
    say("installing Chromium with apt-get")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
    for command in (install, ["apt-get", "update"], install):
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        if command is install and done.returncode == 0:
            return True
    return False


def ensure_chromium() -> Path:
    """A Chromium, installed where that is possible."""
    found = installed_chromium()
    if found is None and can_use_apt() and apt_install():
        found = installed_chromium()
    if found is None:
        raise Failure(
            "the browser tests need Chromium or Chrome: install one, or name one with "
            "CHROMIUM=<path>, and run again."
        )
    return found


def main() -> int:
    print(ensure_chromium())
    return 0


if __name__ == "__main__":
    start(main)
