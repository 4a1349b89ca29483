"""`make lint`: style and types of the Python code and of the page; `--fix` mends what it can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from page import ensure_modules, scripts
from setup import ensure_venv
from toolkit import BUILD, ROOT, Failure, link_folder, say, start

TYPED_PACKAGES = ("attention", "backend", "comfy_plugin", "db")
TYPED_MODULES = ("version", "wire")


def import_root() -> Path:
    """A folder in which the checkout, whatever it is called, is the package ``attnscope``."""
    folder = BUILD / "typing"
    link_folder(folder / "attnscope", ROOT)
    return folder


def type_check(python: Path) -> bool:
    """Check the package under its import name, and report files by their real names."""
    folder = import_root()
    names = [word for name in TYPED_PACKAGES for word in ("-p", f"attnscope.{name}")]
    names += [word for name in TYPED_MODULES for word in ("-m", f"attnscope.{name}")]
    done = subprocess.run(
        [str(python), "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *names],
        # From here mypy names files as attnscope/…, which is then easily taken off.
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(folder), "MYPY_CACHE_DIR": str(BUILD / "mypy")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    prefix = f"attnscope{os.sep}"
    for line in (done.stdout + done.stderr).splitlines():
        print(line[len(prefix) :] if line.startswith(prefix) else line)
    sys.stdout.flush()
    return done.returncode == 0


def run_step(command: list[str], folder: Path = ROOT, env: dict[str, str] | None = None) -> bool:
    """Run one checker with its output shown; True when it found nothing."""
    done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, check=False)
    return done.returncode == 0


def main() -> int:
    fix = "--fix" in sys.argv[1:]
    python = ensure_venv()
    # The tools are programs beside one another, not a package.
    beside = {**os.environ, "MYPYPATH": str(ROOT / "tools"), "MYPY_CACHE_DIR": str(BUILD / "mypy")}
    ruff, mypy = [str(python), "-m", "ruff"], [str(python), "-m", "mypy"]
    passed = {
        "ruff check": run_step([*ruff, "check", "--quiet", *(["--fix"] if fix else []), "."]),
        "ruff format": run_step([*ruff, "format", "--quiet", *([] if fix else ["--diff"]), "."]),
        "mypy": type_check(python),
        "mypy tools": run_step([*mypy, "tools"], env=beside),
    }
    npm = ensure_modules()
    for script in ("lint", "typecheck"):
        if script in scripts():
            name = f"npm run {script}"
            passed[name] = run_step([npm, "run", "--silent", script], ROOT / "frontend")
    failed = [name for name, good in passed.items() if not good]
    if failed:
        raise Failure(f"{', '.join(failed)} found something: see above.")
    say(f"nothing found by {', '.join(passed)}")
    return 0


if __name__ == "__main__":
    start(main)
