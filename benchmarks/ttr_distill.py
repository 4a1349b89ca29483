"""What distilled students are worth: the small Flux, taught while it samples, then judged.

ComfyUI's KSampler draws captions of the training set at the model's largest size (64×64 latent
cells: 32×32 image tokens and the text) with the Flux2TTR node in mode ``distill`` as it comes: one
update of each layer at each of its calls, so 256 of 64 captions with 4 Euler steps each. Then the
students serve every layer and step of 20 captions and seeds that neither the model's training nor
the students' has seen, 20 Euler steps each, beside exact attention.

``ttr_residual_nmse``: median over captions, layers and steps of the NMSE of each served call
against exact attention on its own query, key and value; likewise ``ttr_kernel_nmse`` and
``ttr_scan_nmse``, which train and judge on fewer captions (see ``BESIDE``).
``ttr_residual_psnr``, ``ttr_residual_ssim``: pictures against the exact ones, mean.
``ttr_residual_caption_accuracy_loss``: percentage points of captions drawn right exactly and no
longer by students, less those right only by students.

    COMFYUI_DIR=… python benchmarks/ttr_distill.py
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo_caption_accuracy import SEED, draw, draw_captions, find_comfyui, prepare

RESULTS = (
    "ttr_residual_nmse",
    "ttr_kernel_nmse",
    "ttr_scan_nmse",
    "ttr_residual_psnr",
    "ttr_residual_ssim",
    "ttr_residual_caption_accuracy_loss",
)

CELLS = 64
STEPS = 4
"""Of a training caption."""


@dataclass(frozen=True)
class Amount:
    """Captions to train on and to judge on."""

    taught: int
    judged: int


RESIDUAL = Amount(64, 20)
BESIDE = {"kernel": Amount(32, 3), "scan": Amount(32, 1)}


@dataclass
class Judged:
    """What came of a student."""

    nmse: dict[str, list[float]] = field(default_factory=dict)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    @property
    def all_nmse(self) -> list[float]:
        return [value for values in self.nmse.values() for value in values]


def training_captions(count: int) -> list[Any]:
    """Different captions, none of them held out."""
    import numpy as np

    from attnscope.comfy_plugin.demo.captions import sample_caption

    rng = np.random.default_rng(SEED + 1)
    captions: dict[str, Any] = {}
    while len(captions) < count:
        caption = sample_caption(rng, held_out=False, single_share=0.25)
        captions[caption.text] = caption
    return list(captions.values())


def prepared(model: Any, **settings: Any) -> Any:
    """The model behind the Flux2TTR node; nothing is recorded."""
    from attnscope.attention.settings import TtrSettings
    from attnscope.comfy_plugin import hooks
    from attnscope.comfy_plugin.config import Config

    chosen = TtrSettings(quality_samples=0, **settings)
    return hooks.attach(model, hooks.Plan("ttr", chosen, "", Config(disabled=True)))


def watch_served_calls() -> list[tuple[str, float]]:
    """A list that the layer and the NMSE of each served call go to from now on."""
    import torch

    from attnscope.attention.ttr.variant import TtrVariant

    found: list[tuple[str, float]] = []
    original = TtrVariant.attend

    def attend(self: Any, query: Any, key: Any, value: Any, call: Any) -> Any:
        result = original(self, query, key, value, call)
        if result.out is not None:
            exact = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, scale=call.scale
            )
            error = (result.out - exact).square().sum() / exact.square().sum()
            found.append((str(call.layer), float(error)))
        return result

    TtrVariant.attend = attend  # type: ignore[method-assign]
    return found


def teach(model: Any, codec: Any, student: str, captions: list[Any], path: Path) -> None:
    """Distill; the students are in the checkpoint then."""
    from attnscope.attention.ttr import checkpoint

    began = time.monotonic()
    teacher = prepared(model, student=student, checkpoint=str(path))
    for number, caption in enumerate(captions):
        draw(teacher, codec, caption, CELLS, SEED - 1 - number, steps=STEPS)
    info = checkpoint.read_info(path)
    averages = {
        name: layer.nmse.total / layer.nmse.weight if layer.nmse.weight else float("nan")
        for name, layer in info.layers.items()
    }
    updates = {layer.updates for layer in info.layers.values()}
    print(
        f"{student}: taught by {len(captions)} captions of {STEPS} steps in "
        f"{time.monotonic() - began:.0f} s, {min(updates)} to {max(updates)} updates a layer, "
        f"{sum(layer.ready for layer in info.layers.values())} of {len(info.layers)} layers ready"
    )
    shown = ", ".join(f"{name} {value:.4f}" for name, value in averages.items())
    print(f"  held-out NMSE, averaged: {shown}", flush=True)


def judge_student(
    model: Any, codec: Any, student: str, exact: list[tuple[Any, Any, bool]], path: Path,
    served: list[tuple[str, float]],
) -> Judged:  # fmt: skip
    """Let the students serve everywhere, ready or not, and compare."""
    import numpy as np

    from attnscope.backend.image_quality import difference
    from attnscope.comfy_plugin.demo.scorer import judge

    everywhere = {"ready_threshold": 10.0, "ready_min_updates": 1}
    serving = prepared(model, student=student, checkpoint=str(path), mode="serve", **everywhere)
    judged = Judged()
    for number, (caption, true, _) in enumerate(exact):
        served.clear()
        image = draw(serving, codec, caption, CELLS, SEED + number)
        if len(served) != 6 * 20:
            raise SystemExit(f"{student}: {len(served)} calls were served, not all 120")
        for layer, error in served:
            judged.nmse.setdefault(layer, []).append(error)
        found = difference(*(np.round(x * 255.0).astype(np.uint8) for x in (image, true)))
        assert found.ssim is not None
        judged.psnr.append(found.psnr)
        judged.ssim.append(found.ssim)
        judged.right.append(judge(image, caption).ok)
    layers = ", ".join(
        f"{layer} {statistics.median(values):.4f}" for layer, values in judged.nmse.items()
    )
    ranked = sorted(judged.all_nmse)
    print(
        f"{student}, {len(exact)} unseen captions: NMSE median {statistics.median(ranked):.4f}, "
        f"worst {ranked[-1]:.4f} ({layers}); PSNR {statistics.mean(judged.psnr):.2f} dB, SSIM "
        f"{statistics.mean(judged.ssim):.4f}, {sum(judged.right)}/{len(exact)} captions right, "
        f"exact {sum(right for _, _, right in exact)}",
        flush=True,
    )
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--students", default="residual,kernel,scan")
    parser.add_argument("--taught", type=int, help="captions to train on, of every student")
    parser.add_argument("--judged", type=int, help="captions to judge on, of every student")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.monotonic()
    _alive = prepare(find_comfyui(None))

    from attnscope.comfy_plugin.demo.checkpoint import load_checkpoint
    from attnscope.comfy_plugin.demo.model import build_patcher, checkpoint_path
    from attnscope.comfy_plugin.demo.scorer import judge

    checkpoint = load_checkpoint(checkpoint_path())
    model, codec = build_patcher(checkpoint), checkpoint.codec
    amounts = {}
    for student in options.students.split(","):
        usual = BESIDE.get(student, RESIDUAL)
        amounts[student] = Amount(options.taught or usual.taught, options.judged or usual.judged)
    taught = training_captions(max(amount.taught for amount in amounts.values()))
    exact = []
    for number, caption in enumerate(draw_captions(max(a.judged for a in amounts.values()))):
        image = draw(model, codec, caption, CELLS, SEED + number)
        exact.append((caption, image, bool(judge(image, caption).ok)))
    served = watch_served_calls()
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for student, amount in amounts.items():
            path = Path(folder) / f"{student}.safetensors"
            teach(model, codec, student, taught[: amount.taught], path)
            some = exact[: amount.judged]
            found = judge_student(model, codec, student, some, path, served)
            results[f"ttr_{student}_nmse"] = statistics.median(found.all_nmse)
            lost = sum(right for _, _, right in some) - sum(found.right)
            results[f"ttr_{student}_psnr"] = statistics.mean(found.psnr)
            results[f"ttr_{student}_ssim"] = statistics.mean(found.ssim)
            results[f"ttr_{student}_caption_accuracy_loss"] = 100.0 * lost / len(some)
    print(f"{time.monotonic() - began:.0f} s in all")
    for name in RESULTS:
        if name in results:
            print(f"RESULT {name} {results[name]:.4f}")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
