"""The dashboard's page: built with npm once, and again only when its sources change."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

from processes import install
from toolkit import BUILD, LOGS, ROOT, Failure, Stamp, check_disk, digest, files_below, say, start

FRONTEND = ROOT / "frontend"
DIST = FRONTEND / "dist"
MODULES = FRONTEND / "node_modules"

NODE_WANTED = "20.19 or 22.12 or later"
NOT_SOURCES = ("node_modules", "dist", "coverage", "test-results", ".vite", ".DS_Store")


def node_is_supported(version: tuple[int, ...]) -> bool:
    """Vite's own rule."""
    return (20, 19) <= version < (21,) or version >= (22, 12)


def find_npm() -> str:
    """The npm of a supported Node.js."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        raise Failure(
            f"Node.js with npm is missing: install Node.js {NODE_WANTED} from your package "
            "manager or https://nodejs.org and run again."
        )
    answer = subprocess.run(
        [node, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    found = answer.stdout.strip()
    version = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if not node_is_supported(version):
        raise Failure(
            f"Node.js {NODE_WANTED} is needed and {node} is {found or 'broken'}: install a newer "
            "one and run again."
        )
    return npm


def sources_state(frontend: Path = FRONTEND) -> str:
    """A hash over all that the built page depends on."""
    return digest(files_below(frontend, NOT_SOURCES), frontend)


def lock_state(frontend: Path = FRONTEND) -> str:
    """A hash over what decides the installed packages."""
    return digest([frontend / "package.json", frontend / "package-lock.json"], frontend)


def scripts() -> dict[str, str]:
    """The scripts that package.json offers."""
    try:
        package = json.loads((FRONTEND / "package.json").read_text(encoding="utf-8"))
    except OSError:
        raise Failure(
            "frontend/package.json is missing: get a complete checkout and run again."
        ) from None
    return dict(package.get("scripts", {}))


def ensure_modules() -> str:
    """Install the page's packages; returns npm's path."""
    scripts()
    npm = find_npm()
    wanted = lock_state()
    stamp = Stamp(MODULES / ".attnscope")
    if not stamp.matches(wanted):
        check_disk(FRONTEND, 1.0, "the page's packages")
        say("installing the page's packages with npm")
        stamp.clear()
        install([npm, "ci", "--no-audit", "--no-fund"], "npm", LOGS / "npm-ci.log", cwd=FRONTEND)
        stamp.write(wanted)
    return npm


def ensure_page() -> Path:
    """Build the page where it is stale; returns the folder with its files."""
    stamp = Stamp(BUILD / "stamps" / "page")
    wanted = sources_state()
    if stamp.matches(wanted) and (DIST / "index.html").is_file():
        return DIST
    npm = ensure_modules()
    say("building the page")
    stamp.clear()
    install([npm, "run", "build"], "npm", LOGS / "npm-build.log", cwd=FRONTEND)
    stamp.write(wanted)
    return DIST


def main() -> int:
    ensure_page()
    say(f"the page is built in {DIST.relative_to(ROOT).as_posix()}")
    return 0


if __name__ == "__main__":
    start(main)
