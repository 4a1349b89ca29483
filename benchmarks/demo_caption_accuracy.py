"""How often the demo model draws what a caption says, on captions that training never saw.

Every picture goes through ComfyUI's own KSampler: 20 Euler steps, cfg 1, exact attention, one
picture a call. The captions are drawn, with a fixed seed, from those that the held-out rule of
``captions.is_held_out`` keeps from training; the scorer then reads each picture.

    COMFYUI_DIR=… python benchmarks/demo_caption_accuracy.py

Prints a line per latent size and ``RESULT demo_caption_accuracy <share>``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import runpy
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {32: 24, 48: 24, 64: 56}
"""Latent cells a side → pictures of that size."""
SEED = 20_260_101
STEPS = 20


def prepare(folder: Path) -> dict[str, Any]:
    """Make ComfyUI importable in this process; keep what it returns alive."""
    shim = runpy.run_path(str(ROOT / "tools" / "torchvision_shim" / "sitecustomize.py"))
    sys.path.insert(0, str(folder))
    import comfy.cli_args
    import torch

    if not torch.cuda.is_available():
        comfy.cli_args.args.cpu = True
    return shim


def find_comfyui(given: Path | None) -> Path:
    """The folder given, $COMFYUI_DIR, or the pinned one under .comfyui/."""
    if given or os.environ.get("COMFYUI_DIR"):
        return Path(given or os.environ["COMFYUI_DIR"])
    pinned = sorted((ROOT / ".comfyui").glob("ComfyUI-*/main.py"))
    if not pinned:
        raise SystemExit("No ComfyUI: pass --comfyui or set COMFYUI_DIR.")
    return pinned[-1].parent


def draw_captions(count: int) -> list[Any]:
    """Different held-out captions, a quarter of them with a single thing."""
    import numpy as np

    from attnscope.comfy_plugin.demo.captions import is_held_out, sample_caption

    rng = np.random.default_rng(SEED)
    captions: dict[str, Any] = {}
    while len(captions) < count:
        caption = sample_caption(rng, held_out=True, single_share=0.25)
        captions[caption.text] = caption
    assert all(is_held_out(caption) for caption in captions.values())
    return list(captions.values())


def draw(model: Any, codec: Any, caption: Any, cells: int, seed: int, steps: int = STEPS) -> Any:
    """The picture of a caption by ComfyUI's KSampler: ``[height, width, 3]`` float32 in 0..1.

    Args:
        model: ComfyUI's MODEL.
        codec: decodes its latents.
        caption: what to draw.
        cells: latent cells a side.
        seed: of the noise.
        steps: of Euler's.
    """
    import nodes
    import torch

    from attnscope.comfy_plugin.demo.prompt import encode_prompt

    conditions = []
    for text in (caption.text, ""):
        context, pooled = encode_prompt(text, cells * 8, cells * 8)
        conditions.append([[context[None], {"pooled_output": pooled[None]}]])
    latent = {"samples": torch.zeros(1, 16, cells, cells)}
    with torch.inference_mode():
        (result,) = nodes.KSampler().sample(
            model, seed, steps, 1.0, "euler", "simple", *conditions, latent, 1.0
        )
        return codec.decode(result["samples"])[0].cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder (default $COMFYUI_DIR)")
    parser.add_argument("--checkpoint", type=Path, help="another demo checkpoint to score")
    parser.add_argument("--json", type=Path, help="write every verdict to this file")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    began = time.monotonic()
    _alive = prepare(find_comfyui(options.comfyui))

    from attnscope.comfy_plugin.demo.checkpoint import load_checkpoint
    from attnscope.comfy_plugin.demo.model import build_patcher, checkpoint_path
    from attnscope.comfy_plugin.demo.scorer import judge

    checkpoint = load_checkpoint(options.checkpoint or checkpoint_path())
    model = build_patcher(checkpoint)
    captions = draw_captions(sum(PICTURES.values()))
    rows = []
    start = 0
    for cells, count in PICTURES.items():
        since = time.monotonic()
        right, reasons = 0, Counter()
        for number, caption in enumerate(captions[start : start + count], start):
            image = draw(model, checkpoint.codec, caption, cells, SEED + number)
            verdict = judge(image, caption)
            right += verdict.ok
            reasons[verdict.reason.split(":")[0]] += not verdict.ok
            rows.append(
                {
                    "cells": cells,
                    "caption": caption.text,
                    "things": len(caption.things),
                    "ok": bool(verdict.ok),
                    "reason": verdict.reason,
                }
            )
        start += count
        wrong = ", ".join(f"{name} {n}" for name, n in reasons.items() if n) or "none"
        seconds = time.monotonic() - since
        print(
            f"{cells}x{cells} latents ({cells * 8} px): {right}/{count} = {right / count:.3f}, "
            f"wrong: {wrong}, {seconds:.0f} s",
            flush=True,
        )
    for things, name in ((1, "one thing"), (2, "two things")):
        of = [row["ok"] for row in rows if row["things"] == things]
        print(f"{name}: {sum(of)}/{len(of)} = {sum(of) / len(of):.3f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    share = sum(row["ok"] for row in rows) / len(rows)
    print(f"{len(rows)} pictures, {time.monotonic() - began:.0f} s in all")
    print(f"RESULT demo_caption_accuracy {share:.4f}")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
