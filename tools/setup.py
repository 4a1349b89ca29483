"""The virtual environment with the pinned packages: made once, and again only on a change.

`python tools/setup.py [server] [comfyui] [dev]`; all three when none is named.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from processes import install
from toolkit import (
    LOGS,
    NEWEST_PYTHON,
    OLDEST_PYTHON,
    ROOT,
    WINDOWS,
    Failure,
    Stamp,
    check_disk,
    check_python,
    digest,
    say,
    start,
)

VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "constraints.txt"
COMFYUI_REQUIREMENTS = ROOT / "tools" / "comfyui-requirements.txt"

PARTS = ("server", "comfyui", "dev")
"""What can be installed: the server, what ComfyUI itself needs, and what the checks need."""

DISK_GB = {"server": 0.5, "comfyui": 4.0, "dev": 1.0}

INSTALL_SECTIONS = ("build-system", "project", "tool.setuptools")
"""The sections of pyproject.toml that an installation depends on."""


def venv_python(venv: Path = VENV) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "Scripts" / "python.exe" if WINDOWS else venv / "bin" / "python"


def venv_version(venv: Path) -> tuple[int, ...] | None:
    """The Python version that a virtual environment was made with; None where there is none."""
    try:
        lines = (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition("=") for line in lines)
    settings = {key.strip(): value.strip() for key, _, value in pairs}
    # The standard library's venv and virtualenv name it differently.
    text = settings.get("version") or settings.get("version_info") or ""
    numbers = [int(part) for part in text.split(".")[:3] if part.isdecimal()]
    return tuple(numbers) or None


def install_sections(pyproject: str) -> str:
    """What of pyproject.toml matters here, so that a linter's setting costs no new install."""
    kept: list[str] = []
    inside = False
    for line in pyproject.splitlines():
        if line.startswith("["):
            section = line.strip("[] \t")
            inside = any(section == s or section.startswith(f"{s}.") for s in INSTALL_SECTIONS)
        if inside:
            kept.append(line)
    return "\n".join(kept)


def wanted_state(part: str, root: Path = ROOT) -> str:
    """A hash over all that an installed part depends on."""
    pyproject = (root / "pyproject.toml").read_text(encoding="utf-8")
    return digest(
        [
            part,
            # An editable install and a venv both hold absolute paths.
            str(root),
            install_sections(pyproject),
            CONSTRAINTS,
            *([COMFYUI_REQUIREMENTS] if part == "comfyui" else []),
        ]
    )


def check_venv_module() -> None:
    """Debian and Ubuntu ship Python without the parts that `python -m venv` needs."""
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return
    package = "python{}.{}-venv".format(*sys.version_info[:2])
    raise Failure(
        f"this Python has no complete venv module: install it (on Debian and Ubuntu: "
        f"`sudo apt install {package}`) and run again."
    )


def create_venv(venv: Path = VENV) -> None:
    """Make the virtual environment with the interpreter that runs this."""
    check_python()
    check_venv_module()
    check_disk(venv, 0.2, "the virtual environment")
    say(f"creating the virtual environment {venv.name}")
    if venv.exists():
        shutil.rmtree(venv, ignore_errors=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(venv)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        lines = (made.stdout + made.stderr).strip().splitlines()
        raise Failure(
            f"the virtual environment could not be made («{(lines or ['no message'])[-1]}»): mend "
            "this Python installation or choose another with PYTHON=<path>, and run again."
        )


def usable(venv: Path = VENV) -> bool:
    """Whether there is a virtual environment of a supported version whose Python still exists."""
    version = venv_version(venv)
    return (
        version is not None
        and OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON
        and venv_python(venv).exists()
    )


def pip_news(line: str) -> str | None:
    """Which lines of pip's are worth the user's time."""
    if line.startswith("Downloading ") and " MB)" in line:
        return line.split("(")[0].rstrip() + " (" + line.rsplit("(", 1)[1]
    if line.startswith("Installing collected packages"):
        return f"installing {line.count(',') + 1} packages"
    return None


def ensure_venv(*parts: str) -> Path:
    """Make the virtual environment hold these parts; returns its interpreter."""
    wanted = {part: wanted_state(part) for part in parts or PARTS}
    stamps = {part: Stamp(VENV / ".attnscope" / part) for part in wanted}
    stale = [part for part in wanted if not stamps[part].matches(wanted[part])]
    if not usable():
        create_venv()
        stale = list(wanted)
    if not stale:
        return venv_python()

    check_disk(VENV, max(DISK_GB[part] for part in stale), "the installation of the packages")
    say(f"installing the pinned packages ({', '.join(stale)}); the first time takes minutes")
    extras = ",".join(part for part in stale if part != "comfyui")
    command: list[str | os.PathLike[str]] = [
        venv_python(), "-m", "pip", "install", "--disable-pip-version-check", "--no-input",
        "--progress-bar", "off", "--constraint", CONSTRAINTS.name,
        "--editable", f".[{extras}]" if extras else ".",
    ]  # fmt: skip
    if "comfyui" in stale:
        command += ["--requirement", COMFYUI_REQUIREMENTS.relative_to(ROOT)]
    for part in stale:
        stamps[part].clear()
    install(command, "pip", LOGS / "pip.log", cwd=ROOT, news=pip_news)
    for part in stale:
        stamps[part].write(wanted[part])
    return venv_python()


def main() -> int:
    parts = sys.argv[1:]
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise Failure(f"there is no part {unknown[0]!r}: name any of {', '.join(PARTS)}.")
    ensure_venv(*parts)
    say("the virtual environment is ready")
    return 0


if __name__ == "__main__":
    start(main)
