"""`make test`: every test, those against a real ComfyUI and a real browser included.

python tools/test.py                      everything but the tests marked slow, then the page's
python tools/test.py tests/unit -k gate   pytest alone, with these arguments
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from chromium import ensure_chromium
from comfyui import ensure_comfyui
from page import ensure_modules, ensure_page
from setup import ensure_venv
from toolkit import ROOT, Failure, say, start


def run_step(name: str, command: list[str], env: dict[str, str], folder: str = ".") -> bool:
    """Run one suite with its output shown; True when it passed."""
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT / folder, env=env, stdin=subprocess.DEVNULL, check=False
    )
    verdict = "passed" if done.returncode == 0 else f"FAILED with status {done.returncode}"
    say(f"{name}: {verdict} after {time.monotonic() - began:.0f} s")
    return done.returncode == 0


def pytest_arguments(arguments: list[str]) -> list[str]:
    """The user's arguments; slow tests run only when a marker expression asks for them."""
    chosen = any(word.startswith(("-m", "--markexpr")) for word in arguments)
    return arguments if chosen else ["-m", "not slow", *arguments]


def main() -> int:
    arguments = sys.argv[1:]
    chromium = ensure_chromium()
    python = ensure_venv()
    ensure_page()
    env = {**os.environ, "CHROMIUM": str(chromium), "COMFYUI_DIR": str(ensure_comfyui())}
    passed = {
        "pytest": run_step(
            "pytest", [str(python), "-m", "pytest", *pytest_arguments(arguments)], env
        )
    }
    if not arguments:
        npm = ensure_modules()
        passed["the page's tests"] = run_step("npm test", [npm, "test"], env, "frontend")
    failed = [name for name, good in passed.items() if not good]
    if failed:
        raise Failure(f"{' and '.join(failed)} failed: see above.")
    return 0


if __name__ == "__main__":
    start(main)
