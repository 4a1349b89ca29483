"""A real ComfyUI in this process, a small Flux in it, and a server that only receives."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

sys.path.insert(0, str(HERE))


def _comfyui_folder() -> Path:
    named = os.environ.get("COMFYUI_DIR", "").strip()
    if named:
        return Path(named).expanduser().resolve()
    found = sorted((ROOT / ".comfyui").glob("ComfyUI-*/main.py"))
    if not found:
        pytest.fail("No ComfyUI: set COMFYUI_DIR, or run `python tools/comfyui.py` once")
    return found[-1].parent


@pytest.fixture(scope="session")
def comfyui() -> Iterator[Path]:
    """ComfyUI's modules can be imported; answers its folder."""
    folder = _comfyui_folder()
    shim = runpy.run_path(str(ROOT / "tools" / "torchvision_shim" / "sitecustomize.py"))
    from attnscope.comfy_plugin.demo.train import import_comfy

    import_comfy(folder)
    # One thread: a test that shares its cores must not wait for its own others.
    torch.set_num_threads(1)
    yield folder
    shim.clear()


@pytest.fixture(scope="session")
def flux(comfyui: Path) -> Any:
    """A MODEL: ComfyUI's Flux, two double and four single blocks, random weights."""
    from flux import small_flux

    return small_flux()


@pytest.fixture
def interruptible(comfyui: Path) -> Iterator[None]:
    """ComfyUI's own way to notice an interrupt: in the hook of its progress bars."""
    import comfy.model_management
    import comfy.utils

    def hook(*args: Any, **kwargs: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    yield
    comfy.utils.set_progress_bar_global_hook(before)
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def receiver() -> Iterator[Any]:
    """A server that takes batches and keeps them."""
    from receiver import Receiver

    with Receiver() as running:
        yield running


@pytest.fixture
def plugin(
    comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, receiver: Any
) -> Iterator[Any]:
    """A fresh plugin whose default server is the receiver; its thread is gone at the end."""
    from attnscope.comfy_plugin import hooks, link
    from attnscope.comfy_plugin.plugin import Plugin

    monkeypatch.setenv("ATTNSCOPE_URL", receiver.url)
    monkeypatch.setenv("ATTNSCOPE_LINGER_S", "1")
    monkeypatch.setattr(link, "QUIET_S", 0.05)
    monkeypatch.setattr(link, "LOOK_S", 0.01)
    fresh = Plugin(tmp_path / "spool")
    monkeypatch.setattr(hooks, "get_plugin", lambda: fresh)
    yield fresh
    assert fresh.link.join(30.0), "the link's thread did not end"


@pytest.fixture
def prepared(plugin: Any, flux: Any) -> Callable[..., Any]:
    """Puts one of our nodes on the small Flux: ``prepared("taylor", P=3)``."""
    from attnscope.attention.settings import settings_model
    from attnscope.comfy_plugin.hooks import Plan, attach
    from attnscope.comfy_plugin.plugin import configuration

    def prepare(
        variant: str, *, model: Any = None, label: str = "", url: str = "", **settings: Any
    ) -> Any:
        plan = Plan(variant, settings_model(variant)(**settings), label, configuration(url))
        return attach(flux if model is None else model, plan)

    return prepare
