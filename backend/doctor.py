"""What is wrong with an installation, line by line, and what to do about it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..db import migrate
from ..db.session import Store
from ..version import __version__
from .config import Config, ConfigError

ROOT = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 3.0
TORCH_SECONDS = 60.0
TORCH_PROBE = """
import json
found = {}
try:
    import torch
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    elif torch.backends.mps.is_available():
        found["gpu"] = "mps"
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
try:
    import triton
    found["triton"] = triton.__version__
except Exception:
    pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, what to do."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def examine(config: Config, environ: Mapping[str, str] | None = None) -> list[Check]:
    """Look at everything that an installation needs. Nothing is changed."""
    environ = os.environ if environ is None else environ
    comfyui = comfyui_dir(environ)
    checks: list[Check] = [
        check_python(),
        check_config(config),
        check_database(config),
        check_page(config),
        check_server(environ.get("ATTNSCOPE_URL") or f"http://127.0.0.1:{config.port}"),
        check_comfyui(comfyui),
        check_plugin(comfyui),
    ]
    checks.extend(check_torch(probe_torch(comfyui)))
    return checks


def as_text(checks: Iterable[Check]) -> str:
    """The checks for people."""
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name}: {check.found}")
        if check.remedy and check.state != "ok":
            lines.append(f"      → {check.remedy}")
    return "\n".join(lines)


def as_json(checks: Iterable[Check]) -> str:
    """The checks for programs."""
    items = [asdict(check) for check in checks]
    return json.dumps({"version": __version__, "checks": items}, indent=2)


def check_python() -> Check:
    """Whether this Python is one that is tested."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", found)
    return Check("python", "warn", found, "use Python 3.10 to 3.13, which are tested")


def check_config(config: Config) -> Check:
    """Whether the server would start with this configuration."""
    try:
        config.check()
    except ConfigError as error:
        return Check("configuration", "fail", str(error), "set the tokens, or bind 127.0.0.1")
    tokens = "with tokens" if config.token else "without tokens"
    return Check("configuration", "ok", f"{config.host}:{config.port}, {tokens}")


def check_database(config: Config) -> Check:
    """Whether the database is there and has this version's schema."""
    file = config.data_dir / "attnscope.db"
    if not config.database_url and not file.exists():
        return Check("database", "ok", f"none yet in {config.data_dir}; the server makes it")
    store = Store(config.url, config.busy_timeout)
    try:
        if migrate.is_current(store):
            return Check("database", "ok", f"{file}, schema {migrate.head()}")
        return Check(
            "database", "warn", "has an older schema", "run `attnscope migrate`, or the server"
        )
    except migrate.NewerDatabase as error:
        return Check("database", "fail", str(error), "update AttnScope")
    except Exception as error:
        remedy = "see that the file can be read and written, and that the disk is not full"
        return Check("database", "fail", f"{type(error).__name__}: {error}", remedy)
    finally:
        store.close()


def check_page(config: Config) -> Check:
    """Whether the page is built."""
    if (config.page_dir / "index.html").is_file():
        return Check("page", "ok", str(config.page_dir))
    remedy = "cd frontend && npm ci && npm run build (`make run` does it)"
    return Check("page", "warn", f"not built in {config.page_dir}", remedy)


def check_server(url: str) -> Check:
    """Whether a server answers, and whether it is of this version."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    address = f"{url.rstrip('/')}/api/v1/health"
    try:
        with opener.open(address, timeout=ANSWER_SECONDS) as response:
            health = json.load(response)
    except (OSError, ValueError, urllib.error.URLError) as error:
        remedy = "start it with `attnscope serve`, or set ATTNSCOPE_URL to where it is"
        return Check("server", "warn", f"{url} does not answer ({error})", remedy)
    version = health.get("version") if isinstance(health, dict) else None
    if version != __version__:
        remedy = "restart the server from this installation"
        return Check("server", "warn", f"{url} has version {version}, here {__version__}", remedy)
    return Check("server", "ok", f"{url}, version {version}")


def comfyui_dir(environ: Mapping[str, str]) -> Path | None:
    """ComfyUI's folder: ``COMFYUI_DIR``, or around this installation; None where neither is."""
    named = environ.get("COMFYUI_DIR")
    if named:
        return Path(named).expanduser()
    return ROOT.parent.parent if ROOT.parent.name == "custom_nodes" else None


def check_comfyui(folder: Path | None) -> Check:
    """Whether ComfyUI is where it is said to be."""
    if folder is None:
        return Check("comfyui", "warn", "not known where it is", "set COMFYUI_DIR to its folder")
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        remedy = "set COMFYUI_DIR to the folder that holds ComfyUI's main.py"
        return Check("comfyui", "fail", f"{folder} is no ComfyUI", remedy)
    version = "unknown version"
    file = folder / "comfyui_version.py"
    if file.is_file():
        match = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text("utf-8"))
        version = match[1] if match else version
    return Check("comfyui", "ok", f"{folder}, {version}")


def check_plugin(folder: Path | None) -> Check:
    """Whether ComfyUI has the plugin."""
    if folder is None:
        return Check("plugin", "warn", "ComfyUI is not known", "set COMFYUI_DIR")
    nodes = folder / "custom_nodes"
    found = [entry for entry in _entries(nodes) if (entry / "comfy_plugin").is_dir()]
    if not found:
        remedy = f"ln -s {ROOT} {nodes / 'attnscope'} (or clone the repository there)"
        return Check("plugin", "fail", f"not in {nodes}", remedy)
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        return Check("plugin", "fail", f"more than once: {names}", "leave one of them")
    version = _plugin_version(found[0])
    if version != __version__:
        remedy = "update the older one: plugin and server are released together"
        return Check("plugin", "warn", f"version {version}, server {__version__}", remedy)
    return Check("plugin", "ok", f"{found[0]}, version {version}")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if (entry / "wire.py").is_file())
    except OSError:
        return []


def _plugin_version(folder: Path) -> str:
    try:
        match = re.search(r'__version__ = "([^"]+)"', (folder / "version.py").read_text("utf-8"))
    except OSError:
        return "unknown"
    return match[1] if match else "unknown"


def probe_torch(folder: Path | None) -> dict[str, Any]:
    """Ask ComfyUI's Python, or this one, for torch; in a process of its own."""
    python = _comfyui_python(folder) or sys.executable
    try:
        done = subprocess.run(
            [python, "-c", TORCH_PROBE], capture_output=True, text=True, timeout=TORCH_SECONDS
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        found = {"error": f"{python}: {type(error).__name__}"}
    return {"python": str(python), **found}


def _comfyui_python(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    places = (
        folder / ".venv" / "bin" / "python",
        folder / "venv" / "bin" / "python",
        folder / ".venv" / "Scripts" / "python.exe",
        folder / "venv" / "Scripts" / "python.exe",
        folder.parent / "python_embeded" / "python.exe",
    )
    return next((place for place in places if place.is_file()), None)


def check_torch(found: Mapping[str, Any]) -> list[Check]:
    """What was found of torch, the GPU and Triton."""
    if "torch" not in found:
        remedy = "only the plugin needs torch: run the doctor with ComfyUI's Python"
        error = str(found.get("error", "not installed"))
        return [Check("torch", "warn", f"{error} ({found.get('python')})", remedy)]
    checks = [Check("torch", "ok", f"{found['torch']} ({found['python']})")]
    add: Callable[[Check], None] = checks.append
    if "gpu" in found:
        add(Check("gpu", "ok", str(found["gpu"])))
    else:
        remedy = "sampling runs on the CPU: fine for the demo, slow for Flux"
        add(Check("gpu", "warn", "torch sees none", remedy))
    if "triton" in found:
        add(Check("triton", "ok", str(found["triton"])))
    else:
        remedy = "pip install triton (Linux) or triton-windows; the torch path works without"
        add(Check("triton", "warn", "not installed", remedy))
    return checks
