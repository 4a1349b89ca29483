"""Trains the demo model: rectified flow on pictures drawn on the fly.

Run ``python -m attnscope.comfy_plugin.demo.train --help``. A run is one stage of ``--steps``
steps; a further stage resumes from the same ``--state`` file with new settings. Captions that
``captions.is_held_out`` names are never drawn.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from .batches import Batches, Prompts, Stage
from .captions import Caption, sample_caption
from .checkpoint import UNET_CONFIG, save_checkpoint
from .codec import LinearCodec, fit_codec
from .head_start import add_out_of_place, attention_options, init_weights
from .scorer import judge

CODEC_SEED = 0
EVAL_SEED = 1_000_003


def import_comfy(folder: Path | None) -> None:
    """Make ``comfy`` importable from a ComfyUI folder and choose the CPU where there is no GPU."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        import comfy.cli_args
    except ImportError as error:
        raise SystemExit(
            "ComfyUI is not importable: pass --comfyui or set COMFYUI_DIR to its folder."
        ) from error
    if not torch.cuda.is_available():
        comfy.cli_args.args.cpu = True


def flow_loss(
    flux: Any,
    clean: Tensor,
    noise: Tensor,
    times: Tensor,
    context: Tensor,
    pooled: Tensor,
) -> Tensor:
    """Rectified-flow loss: the mean squared error of the velocity ``noise − clean``.

    clean, noise [B, 16, h, w]; times [B] in 0..1; context [B, L, 64]; pooled [B, 64].
    """
    level = times[:, None, None, None]
    noisy = level * noise + (1 - level) * clean
    options = attention_options(clean.device)
    velocity = flux(noisy, times, context, pooled, transformer_options=options)
    return nn.functional.mse_loss(velocity.float(), noise - clean)


class Trainer:
    """Model, optimiser and averaged weights, with a state file that holds all of them."""

    def __init__(self, stage: Stage, device: torch.device, codec: LinearCodec | None = None):
        from .model import build_base_model

        self.stage, self.device = stage, device
        self.codec = codec or fit_codec(CODEC_SEED)
        base = build_base_model(
            {"unet": UNET_CONFIG, "shift": stage.shift}, self.codec, dtype=torch.float32
        )
        # Filled on the CPU, so that a seed means the same weights on every device.
        self.flux = base.diffusion_model.cpu().train()
        init_weights(self.flux, stage.seed)
        self.flux.to(device)
        add_out_of_place(self.flux)
        self.averaged = {n: p.detach().clone() for n, p in self.flux.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.flux.parameters(),
            lr=stage.lr,
            betas=(0.9, 0.99),
            weight_decay=stage.weight_decay,
            fused=True,
        )
        self.prompts = Prompts()
        self.step = 0
        self.stages: list[dict[str, Any]] = []

    def train_step(
        self, batch: tuple[Tensor, Tensor, Tensor, list[str]], rate: float
    ) -> tuple[Tensor, int]:
        """One step at a learning rate; returns the loss (on the device) and the latent side."""
        clean, noise, times, texts = batch
        cells = clean.shape[-1]
        context, pooled = self.prompts.batch(texts, cells)
        inputs = [
            t.to(self.device, non_blocking=True) for t in (clean, noise, times, context, pooled)
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = flow_loss(self.flux, *inputs)
            loss.backward()
        nn.utils.clip_grad_norm_(self.flux.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.stage.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averaged.values()), list(self.flux.parameters()), 1 - keep
            )
        return loss.detach(), cells

    def finish_stage(self, note: dict[str, Any]) -> None:
        self.stages.append({**asdict(self.stage), **note})

    def save_state(self, path: Path, index: int) -> None:
        """Everything that a resumed run needs, as safetensors (never a pickle)."""
        tensors = {f"weights.{n}": p.detach() for n, p in self.flux.named_parameters()}
        tensors |= {f"averaged.{n}": p for n, p in self.averaged.items()}
        for name, parameter in self.flux.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        about = {
            "step": self.step,
            "index": index,
            "stage": asdict(self.stage),
            "stages": self.stages,
        }
        partial = path.with_name(path.name + ".partial")
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, str(partial), metadata={"state": json.dumps(about)})
        partial.replace(path)

    def load_state(self, path: Path) -> int:
        """Resume; returns how many steps of this very stage are done (0 for a new stage)."""
        with safe_open(str(path), framework="pt", device=str(self.device)) as file:
            about = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.no_grad():
            for name, parameter in self.flux.named_parameters():
                parameter.copy_(tensors[f"weights.{name}"])
                self.averaged[name].copy_(tensors[f"averaged.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.step.{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"optimizer.{key}.{name}"] for key in keys
                    }
        self.step, self.stages = about["step"], about["stages"]
        unbroken = about["stage"] == asdict(self.stage) and about["index"] < self.stage.steps
        return about["index"] if unbroken else 0

    def export(self, path: Path) -> None:
        """The averaged weights as a demo checkpoint."""
        about = {
            "unet": UNET_CONFIG,
            "shift": self.stage.shift,
            "steps": self.step,
            "stages": self.stages,
        }
        save_checkpoint(path, self.averaged, self.codec, about)

    @torch.no_grad()
    def evaluate(self, cells: int, count: int, steps: int = 20) -> tuple[float, dict[str, int]]:
        """Share of held-out captions that the averaged weights draw right, and the failures.

        A plain Euler loop on the sampler's own schedule: a quick look in training, not the score.
        """
        current = {n: p.detach().clone() for n, p in self.flux.named_parameters()}
        self._put(self.averaged)
        rng = np.random.default_rng(EVAL_SEED)
        captions: list[Caption] = [sample_caption(rng, held_out=True) for _ in range(count)]
        noise = rng.standard_normal((count, 16, cells, cells), dtype=np.float32)
        images = []
        for start in range(0, count, 10):
            texts = [caption.text for caption in captions[start : start + 10]]
            context, pooled = (t.to(self.device) for t in self.prompts.batch(texts, cells))
            x = torch.from_numpy(noise[start : start + 10]).to(self.device)
            line = torch.linspace(1, 0, steps + 1)
            sigmas = self.stage.shift * line / (1 + (self.stage.shift - 1) * line)
            options = attention_options(self.device)
            for now, after in pairwise(sigmas):
                level = now.repeat(len(texts)).to(self.device)
                v = self.flux(x, level, context, pooled, transformer_options=options)
                x = x + (after - now) * v.float()
            images.append(self.codec.decode(x).cpu().numpy())
        self._put(current)
        verdicts = [
            judge(image, c) for image, c in zip(np.concatenate(images), captions, strict=True)
        ]
        reasons: dict[str, int] = {}
        for verdict in verdicts:
            key = ":".join(verdict.reason.split(":")[:2])
            reasons[key] = reasons.get(key, 0) + 1
        return sum(v.ok for v in verdicts) / count, reasons

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.flux.named_parameters():
            parameter.copy_(weights[name])


def build_parser() -> argparse.ArgumentParser:
    """The command line: a stage's settings, and where things lie."""
    parser = argparse.ArgumentParser(prog="python -m attnscope.comfy_plugin.demo.train")
    helps = {
        "steps": "steps of this stage",
        "minutes": "end the stage after so many minutes, if the steps are not done; 0: no limit",
        "sizes": "latent sides with their share of the steps, e.g. 16:0.5,32:0.5",
        "batch_tokens": "tokens a step; pictures a step follow from it",
        "lr": "learning rate after warmup",
        "lr_end": "learning rate at the stage's end",
        "warmup": "warmup steps of this stage",
        "weight_decay": "AdamW's weight decay",
        "ema": "decay of the averaged weights, which are what is exported",
        "dropout": "share of captions emptied, for classifier-free guidance",
        "shift": "shift of the sampler's noise schedule, stored in the checkpoint",
        "seed": "seed of weights and data",
    }
    defaults = asdict(Stage())
    for name, text in helps.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(defaults[name]),
            default=defaults[name],
            help=f"{text} (default {defaults[name]})",
        )
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument(
        "--state", type=Path, required=True, help="training state; resumed from where it exists"
    )
    parser.add_argument("--log", type=Path, help="loss curve (CSV, appended to)")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder (default $COMFYUI_DIR)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that draw pictures; 0: this one does"
    )
    parser.add_argument("--save-minutes", type=float, default=4.0, help="minutes between saves")
    parser.add_argument("--eval-cells", default="32", help="latent sides to look at, e.g. 32,64")
    parser.add_argument("--eval-count", type=int, default=30, help="captions a look")
    parser.add_argument("--eval-minutes", type=float, default=8.0, help="minutes between looks")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one stage."""
    import os

    options = build_parser().parse_args(argv)
    folder = options.comfyui or os.environ.get("COMFYUI_DIR")
    import_comfy(Path(folder) if folder else None)
    stage = Stage(**{name: getattr(options, name) for name in asdict(Stage())})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(stage, device)
    first = trainer.load_state(options.state) if options.state.exists() else 0
    run(trainer, first, options)


def run(trainer: Trainer, first: int, options: argparse.Namespace) -> None:
    """Train the stage from its step ``first``, saving, logging and looking as told."""
    stage = trainer.stage
    batches = Batches(stage, trainer.codec, trainer.step - first)
    loader = DataLoader(
        Subset(batches, range(first, stage.steps)),
        batch_size=None,
        num_workers=options.workers,
        multiprocessing_context="spawn" if options.workers else None,
        pin_memory=trainer.device.type == "cuda",
    )
    stopped: list[int] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: stopped.append(number))
    began = saved = looked = time.monotonic()
    done = first
    losses: dict[int, list[Tensor]] = {}
    with options.log.open("a", newline="") if options.log else nullcontext() as file:
        writer = csv.writer(file) if file else None
        for index, batch in enumerate(loader, start=first):
            seconds = time.monotonic() - began
            if stopped or stage.progress(index, seconds) >= 1:
                break
            loss, cells = trainer.train_step(batch, stage.learning_rate(index, seconds))
            done = index + 1
            losses.setdefault(cells, []).append(loss)
            if trainer.step % 100 == 0:
                means = {c: round(float(torch.stack(v).mean()), 4) for c, v in losses.items()}
                means = dict(sorted(means.items()))
                print(f"step {trainer.step} at {seconds:.0f} s: loss {means}", flush=True)
                if writer and file:
                    for side, mean in means.items():
                        writer.writerow([trainer.step, side, mean, round(seconds)])
                    file.flush()
                losses.clear()
            now = time.monotonic()
            if now - saved > 60 * options.save_minutes:
                trainer.save_state(options.state, done)
                trainer.export(options.out)
                saved = now
            if now - looked > 60 * options.eval_minutes:
                look(trainer, options)
                looked = time.monotonic()
    # A stage that is cut short is recorded with what it did.
    trainer.finish_stage(
        {"seconds": round(time.monotonic() - began), "first": first, "done": done}
    )
    trainer.save_state(options.state, done)
    trainer.export(options.out)
    look(trainer, options)


def look(trainer: Trainer, options: argparse.Namespace) -> None:
    """Print how many held-out captions come out right."""
    for cells in (int(part) for part in options.eval_cells.split(",")):
        share, reasons = trainer.evaluate(cells, options.eval_count)
        print(f"step {trainer.step}: held-out {cells}x{cells} {share:.2f} {reasons}", flush=True)


if __name__ == "__main__":
    main()
