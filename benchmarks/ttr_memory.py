"""Whether training again and again makes the process grow.

ComfyUI's KSampler samples the small Flux through the Flux2TTR node in mode ``distill``, run after
run: students are built or read, taught, written and released each time. Each run learns, keeps
earlier calls up to its bound and reports to a server that only receives. The runtime is dropped
between runs half of the time, so that recovery from the checkpoint is among what is repeated.

    COMFYUI_DIR=… python benchmarks/ttr_memory.py

``ttr_memory_growth_mb``: resident memory of the process after 20 runs less that after 2.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo_caption_accuracy import find_comfyui, prepare

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "comfyui")]

RESULTS = ("ttr_memory_growth_mb",)

RUNS = 20
FIRST = 2
SIDE = 64
STEPS = 4


def resident_mb() -> float:
    """Memory of this process that is in RAM."""
    import psutil

    gc.collect()
    return float(psutil.Process().memory_info().rss) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="residual")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.monotonic()
    _alive = prepare(find_comfyui(None))

    import folder_paths
    from flux import sample, small_flux
    from receiver import Receiver

    from attnscope.attention.settings import TtrSettings
    from attnscope.attention.ttr import pool
    from attnscope.comfy_plugin import hooks
    from attnscope.comfy_plugin.config import Config
    from attnscope.comfy_plugin.plugin import Plugin

    settings = TtrSettings(
        student=options.student, progress_every=2, updates_per_call=2, replay_mb=16
    )
    with tempfile.TemporaryDirectory() as folder, Receiver() as receiver:
        folder_paths.set_output_directory(folder)
        plugin = Plugin(Path(folder) / "spool")
        hooks.get_plugin = lambda: plugin
        config = Config(url=receiver.url, linger_s=1.0)
        model: Any = hooks.attach(small_flux(), hooks.Plan("ttr", settings, "", config))
        kept = pool.KEPT_BYTES
        sizes = []
        for run in range(RUNS):
            pool.KEPT_BYTES = 0 if run % 2 else kept
            sample(model, side=SIDE, steps=STEPS, seed=run)
            receiver.finished(run + 1)
            with receiver.lock:
                # What the receiver keeps of each run is the benchmark's own.
                receiver.batches.clear()
            sizes.append(resident_mb())
        updates = sum(
            len(event.updates.layer)
            for events in receiver.events.values()
            for event in events.values()
            if event.kind == "students_updated"
        )
        assert plugin.link.join(60.0)
    print("after each run, MiB: " + ", ".join(f"{size:.0f}" for size in sizes))
    print(f"{updates} updates, {time.monotonic() - began:.0f} s in all")
    if updates == 0:
        raise SystemExit("nothing was taught")
    print(f"RESULT ttr_memory_growth_mb {sizes[RUNS - 1] - sizes[FIRST - 1]:.1f}")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
