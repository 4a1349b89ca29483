"""How well attention variants fit what a trained model really asks: the small Flux's own tensors.

ComfyUI's KSampler draws held-out captions with the demo checkpoint on a 64×64 latent (20 Euler
steps, cfg 1, exact attention). The AttnScope Monitor captures query, key and value of all six
layers at an early, a middle and a late step. Every configuration is then measured on every
captured call, as ``attnscope evaluate`` does it, and medians are printed by noise level.

``taylor_small_flux_nmse``: median NMSE over all calls of Taylor attention as it comes (default
settings).

``tiled_small_flux_nmse``: the same of tiled attention as it comes, its gates apart, which would
keep calls as small as these exact. The 32×32 image tokens are 4×4 tiles, of which a query's window
leaves 7 to the approximation; a window of the query's own tile alone, which leaves 15, is measured
beside it.

    COMFYUI_DIR=… python benchmarks/evaluate_small_flux.py
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

RESULTS = ("taylor_small_flux_nmse", "tiled_small_flux_nmse")

TILED = "tiled:min_tokens=0,dense_first_steps=0"
MEASURED = {"taylor_small_flux_nmse": "taylor", "tiled_small_flux_nmse": TILED}
"""What each result is the median NMSE of, as ``attnscope evaluate --variants`` takes it."""

BESIDE = (f"{TILED},window_radius=0", f"{TILED},far_order=0")
"""Measured too, as is the command's default list."""

CELLS = 64
STEPS = 20
CAPTURED_STEPS = (1, 9, 17)
LAYERS = 6
SEED = 20_260_201


def prepare() -> dict[str, Any]:
    """Make ComfyUI importable in this process; keep what it returns alive."""
    from comfyui import ensure_comfyui

    from attnscope.comfy_plugin.demo.train import import_comfy

    shim = runpy.run_path(str(ROOT / "tools" / "torchvision_shim" / "sitecustomize.py"))
    import_comfy(Path(os.environ.get("COMFYUI_DIR") or ensure_comfyui()))
    return shim


def capture(folder: Path, prompts: int) -> list[Path]:
    """Sample with the Monitor's capture on; the files.

    Args:
        folder: stands in for ComfyUI's output and for the plugin's spool.
        prompts: how many captions that training never saw.
    """
    import folder_paths
    import nodes
    import numpy as np
    import torch

    from attnscope.attention.settings import MonitorSettings
    from attnscope.comfy_plugin import hooks
    from attnscope.comfy_plugin.config import Config
    from attnscope.comfy_plugin.demo.captions import sample_caption
    from attnscope.comfy_plugin.demo.model import load_demo_model
    from attnscope.comfy_plugin.demo.prompt import encode_prompt
    from attnscope.comfy_plugin.plugin import Plugin

    folder_paths.set_output_directory(str(folder))
    plugin = Plugin(folder / "spool")
    hooks.get_plugin = lambda: plugin
    settings = MonitorSettings(
        capture_layers="all",
        capture_steps=",".join(map(str, CAPTURED_STEPS)),
        quality_samples=0,
    )
    # No server listens at port 9: what the runs report stays in the temporary spool.
    plan = hooks.Plan("exact", settings, "", Config(url="http://127.0.0.1:9"))
    model = hooks.attach(load_demo_model(), plan)
    rng = np.random.default_rng(SEED)
    for number in range(prompts):
        caption = sample_caption(rng, held_out=True)
        both = [encode_prompt(text, CELLS * 8, CELLS * 8) for text in (caption.text, "")]
        positive, negative = ([[c[None], {"pooled_output": p[None]}]] for c, p in both)
        latent = {"samples": torch.zeros(1, 16, CELLS, CELLS)}
        with torch.inference_mode():
            nodes.KSampler().sample(
                model, SEED + number, STEPS, 1.0, "euler", "simple", positive, negative, latent,
                1.0,
            )  # fmt: skip
        print(f"sampled: {caption.text}", flush=True)
    return written(folder, prompts * len(CAPTURED_STEPS) * LAYERS)


def written(folder: Path, expected: int) -> list[Path]:
    """The captured files, once the thread that writes them is done."""
    deadline = time.monotonic() + 60.0
    while len(files := sorted(folder.glob("attnscope-captures/*/*.safetensors"))) < expected:
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(files)} calls were captured; {expected} were expected")
        time.sleep(0.05)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=4, help="captions to sample (default 4)")
    parser.add_argument("--pairs", type=int, default=1, help="timed pairs a call; 0 for none")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    _alive = prepare()

    from attnscope.attention.evaluation import evaluate
    from attnscope.backend import evaluating, evaluation_summary

    texts = dict.fromkeys([*MEASURED.values(), *BESIDE, *evaluating.DEFAULT_VARIANTS])
    chosen = evaluating.configurations(list(texts))
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for file in capture(Path(folder), options.prompts):
            case = evaluating.captured_case(file)
            outcomes.extend(evaluate(case, chosen, pairs=options.pairs))
    print(evaluation_summary.table(outcomes))
    for name, label in MEASURED.items():
        mine = [outcome for outcome in outcomes if outcome.configuration == label]
        found = [outcome.nmse for outcome in mine if outcome.nmse is not None]
        print(f"\n{label}: measured on {len(found)} of {len(mine)} calls; medians by layer")
        for layer in sorted({outcome.layer for outcome in mine}):
            of_layer = [outcome for outcome in mine if outcome.layer == layer]
            std = statistics.median(outcome.logit_std for outcome in of_layer)
            errors = [outcome.nmse for outcome in of_layer if outcome.nmse is not None]
            middle = statistics.median(errors) if errors else float("nan")
            worst = max(errors, default=float("nan"))
            print(f"  {layer}: logit std {std:.2f}, NMSE {middle:.3g}, at worst {worst:.3g}")
        print(f"RESULT {name} {statistics.median(found) if found else float('nan'):.4g}")


if __name__ == "__main__":
    main()
