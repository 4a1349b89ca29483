"""Whether ComfyUI and the process are, after our runs, what they were before them.

Before and after, everything is compared that a run of ours could have changed: every attribute of
the modules and classes that attention and sampling go through, the original model's tables, hooks
and options and those of our clones, the hook of the progress bars, the handlers of progress and
logging, threads, signals, exception hooks and the spool's folder. Between the two lie runs that
complete (monitor, Taylor, hybrid, a chained override, two models), that raise and that are
interrupted, with a server and without one.

    COMFYUI_DIR=… python benchmarks/comfyui_restore.py

Prints what differs, if anything, and ``RESULT comfyui_restore`` 1 (everything as before) or 0.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "comfyui"), str(ROOT / "tools")]

RESULTS = ("comfyui_restore",)


def interruptible() -> None:
    """Notice interrupts where ComfyUI's own process does: when progress is reported."""
    import comfy.model_management
    import comfy.utils

    def hook(*args: Any, **kwargs: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    comfy.utils.set_progress_bar_global_hook(hook)


def chained(model: Any) -> Any:
    """A clone on which another node has set an override."""
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda func, *args, **kwargs: func(*args, **kwargs)
    return clone


def run_all(plugin: Any, receiver: Any, models: dict[str, Any]) -> list[str]:
    """Every kind of run; answers how each ended."""
    import comfy.model_management as management
    from flux import acting, sample

    def fail() -> None:
        raise ValueError("the model broke")

    ends = []
    runs = [
        ("monitor", models["monitor"], {}),
        ("taylor", models["taylor"], {"sampler": "heun"}),
        ("hybrid", models["hybrid"], {"side": 16}),
        ("guidance", models["taylor"], {"cfg": 3.0, "tokens": (16, 15)}),
        ("chained override", models["chained"], {}),
        ("second model", models["second"], {"steps": 2}),
        ("exception", acting(models["taylor"], {2: fail}), {}),
        ("exception in a hybrid run", acting(models["hybrid"], {2: fail}), {"side": 16}),
        ("interrupt", acting(models["monitor"], {1: management.interrupt_current_processing}), {}),
    ]  # fmt: skip
    for name, model, options in runs:
        try:
            sample(model, **options)
            ends.append(f"{name}: completed")
        except (ValueError, management.InterruptProcessingException) as error:
            ends.append(f"{name}: {type(error).__name__}")
        finally:
            management.interrupt_current_processing(False)
    receiver.finished(len(runs))
    receiver.stop()
    sample(models["monitor"])
    ends.append("without a server: completed")
    assert plugin.link.join(60.0)
    receiver.start()
    sample(models["monitor"])
    receiver.finished(len(runs) + 2)
    assert plugin.link.join(60.0)
    return ends


def main() -> None:
    logging.disable(logging.WARNING)
    shim = runpy.run_path(str(ROOT / "tools" / "torchvision_shim" / "sitecustomize.py"))
    from comfyui import ensure_comfyui

    from attnscope.comfy_plugin.demo.train import import_comfy

    import_comfy(Path(os.environ.get("COMFYUI_DIR") or ensure_comfyui()))
    assert shim
    import state
    from flux import sample, small_flux
    from receiver import Receiver

    from attnscope.attention.settings import settings_model
    from attnscope.comfy_plugin import hooks
    from attnscope.comfy_plugin.config import Config
    from attnscope.comfy_plugin.plugin import Plugin

    interruptible()
    with tempfile.TemporaryDirectory() as folder, Receiver() as receiver:
        plugin = Plugin(Path(folder) / "spool")
        hooks.get_plugin = lambda: plugin
        config = Config(url=receiver.url, linger_s=1.0)

        def prepared(variant: str, model: Any, **settings: Any) -> Any:
            return hooks.attach(
                model, hooks.Plan(variant, settings_model(variant)(**settings), "", config)
            )

        first, second = small_flux(0), small_flux(1)
        models = {
            "monitor": prepared("exact", first),
            "taylor": prepared("taylor", first, min_tokens=1),
            "hybrid": prepared(
                "hybrid",
                first,
                min_tokens=1,
                local_window=4,
                local_chunk=16,
                log_quality_stats=False,
            ),
            "chained": prepared("taylor", chained(first), min_tokens=1),
            "second": prepared("exact", second),
        }
        # What ComfyUI itself changes at its first sampling is not ours.
        sample(first)
        sample(second)
        before = state.of_process(first, second, *models.values())
        for end in run_all(plugin, receiver, models):
            print(end)
        changed = state.differences(before, state.of_process(first, second, *models.values()))
        left = [str(path) for path in (Path(folder) / "spool").rglob("*")]
    for name in (*changed, *left):
        print(f"not as before: {name}")
    print(f"{len(before)} things compared, {len(changed) + len(left)} of them not as before")
    print(f"RESULT comfyui_restore {int(not changed and not left)}")


if __name__ == "__main__":
    main()
