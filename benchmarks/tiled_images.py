"""What tiled attention does to finished pictures: the small Flux, tiled against exact.

ComfyUI's KSampler draws captions that training never saw at the model's largest size (64×64 latent
cells: 32×32 image tokens, 4×4 tiles) with 20 Euler steps at cfg 1, each with the same seed exactly
and tiled: once as it comes but for ``min_tokens``, which would keep calls as small as these exact,
and once with the first steps tiled too (``dense_first_steps`` 0).

``tiled_images_psnr``, ``tiled_images_ssim``: mean over the captions, the settings as they come.
``tiled_caption_accuracy_loss``: percentage points of the captions that are drawn right exactly and
no longer tiled, less those that are right only tiled; the greater of both settings.

    COMFYUI_DIR=… python benchmarks/tiled_images.py
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_caption_accuracy import SEED, draw, draw_captions, find_comfyui, prepare

RESULTS = ("tiled_images_psnr", "tiled_images_ssim", "tiled_caption_accuracy_loss")

CELLS = 64
CAPTIONS = 20
CHANGES: dict[str, dict[str, int]] = {
    "as it comes": {"min_tokens": 0},
    "all steps": {"min_tokens": 0, "dense_first_steps": 0},
}
"""Settings of tiled attention that differ from its defaults."""


@dataclass
class Drawn:
    """Of the pictures drawn one way: whether each is right, and how near to the exact one."""

    right: list[bool]
    psnr: list[float]
    ssim: list[float]


def tiled_models(model: Any, folder: Path) -> dict[str, Any]:
    """A model for each of `CHANGES`; what their runs report stays in ``folder``."""
    from attnscope.attention.settings import TiledSettings
    from attnscope.comfy_plugin import hooks
    from attnscope.comfy_plugin.config import Config
    from attnscope.comfy_plugin.plugin import Plugin

    plugin = Plugin(folder)
    hooks.get_plugin = lambda: plugin
    # No server listens at port 9.
    config = Config(url="http://127.0.0.1:9")
    return {
        name: hooks.attach(
            model, hooks.Plan("tiled", TiledSettings(quality_samples=0, **changes), "", config)
        )
        for name, changes in CHANGES.items()
    }


def count_tiled_calls() -> list[int]:
    """A counter, in a list, of the calls that tiled attention has answered from now on."""
    from attnscope.attention.tiled.variant import TiledVariant

    counted = [0]
    original = TiledVariant.attend

    def attend(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        counted[0] += result.out is not None
        return result

    TiledVariant.attend = attend  # type: ignore[method-assign]
    return counted


def report(name: str, drawn: Drawn, exact: Drawn) -> float:
    """Print what came of one setting; its loss of accuracy, in points."""
    lost = 100.0 * (sum(exact.right) - sum(drawn.right)) / len(exact.right)
    print(
        f"tiled, {name}: PSNR {statistics.mean(drawn.psnr):.2f} dB "
        f"({min(drawn.psnr):.1f} to {max(drawn.psnr):.1f}), "
        f"SSIM {statistics.mean(drawn.ssim):.4f} (worst {min(drawn.ssim):.4f}), "
        f"{sum(drawn.right)}/{len(drawn.right)} captions right, exact {sum(exact.right)}"
    )
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.monotonic()
    _alive = prepare(find_comfyui(None))

    import numpy as np

    from attnscope.backend.image_quality import difference
    from attnscope.comfy_plugin.demo.checkpoint import load_checkpoint
    from attnscope.comfy_plugin.demo.model import build_patcher, checkpoint_path
    from attnscope.comfy_plugin.demo.scorer import judge

    checkpoint = load_checkpoint(checkpoint_path())
    model = build_patcher(checkpoint)
    calls = count_tiled_calls()
    exact = Drawn([], [], [])
    with tempfile.TemporaryDirectory() as folder:
        models = tiled_models(model, Path(folder))
        drawn = {name: Drawn([], [], []) for name in models}
        for number, caption in enumerate(draw_captions(options.captions)):
            seed = SEED + number
            true = draw(model, checkpoint.codec, caption, CELLS, seed)
            exact.right.append(judge(true, caption).ok)
            line = [f"{caption.text}: exact {'right' if exact.right[-1] else 'wrong'}"]
            for name, tiled in models.items():
                before = calls[0]
                image = draw(tiled, checkpoint.codec, caption, CELLS, seed)
                if calls[0] == before:
                    raise SystemExit(f"tiled, {name}: no call was tiled")
                found = difference(*(np.round(x * 255.0).astype(np.uint8) for x in (image, true)))
                assert found.ssim is not None
                mine = drawn[name]
                mine.right.append(judge(image, caption).ok)
                mine.psnr.append(found.psnr)
                mine.ssim.append(found.ssim)
                line.append(
                    f"{name} {found.psnr:.1f} dB, {'right' if mine.right[-1] else 'wrong'} "
                    f"({calls[0] - before} calls)"
                )
            print("; ".join(line), flush=True)
    loss = max(report(name, one, exact) for name, one in drawn.items())
    first = drawn["as it comes"]
    print(f"{len(exact.right)} captions, {time.monotonic() - began:.0f} s in all")
    print(f"RESULT {RESULTS[0]} {statistics.mean(first.psnr):.2f}")
    print(f"RESULT {RESULTS[1]} {statistics.mean(first.ssim):.4f}")
    print(f"RESULT {RESULTS[2]} {loss:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
