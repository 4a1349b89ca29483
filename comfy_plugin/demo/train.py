"""Trains the demo model: rectified flow on pictures drawn on the fly.

Run ``python -m attnscope.comfy_plugin.demo.train --help``. A run is one stage of ``--steps``
steps; a further stage resumes from the same ``--state`` file with new settings. Captions that
``captions.is_held_out`` names are never drawn.
"""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import json
import math
import signal
import sys
import textwrap
import time
import types
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from .captions import Caption, sample_caption
from .checkpoint import UNET_CONFIG, save_checkpoint
from .codec import CELL, CHANNELS, LinearCodec, fit_codec
from .pictures import render
from .prompt import (
    ANCHOR_PAIRS,
    ANCHOR_X_AT,
    AXIS_DIM,
    encode_prompt,
)
from .scorer import judge

CODEC_SEED = 0
EVAL_SEED = 1_000_003


@dataclass(frozen=True)
class Stage:
    """What one run of training does; every field is a command-line option of the same name."""

    steps: int = 1000
    minutes: float = 0.0
    sizes: str = "16:0.5,24:0.2,32:0.3"
    batch_tokens: int = 2560
    lr: float = 1e-3
    lr_end: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    dropout: float = 0.1
    shift: float = 4.0
    seed: int = 0

    def size_shares(self) -> dict[int, float]:
        """Latent cells a side → share of the steps; ValueError where the text is not that."""
        shares = {}
        for part in self.sizes.split(","):
            cells, _, share = part.partition(":")
            shares[int(cells)] = float(share or 1)
        if any(cells < 2 or cells % 2 for cells in shares) or sum(shares.values()) <= 0:
            raise ValueError(f"--sizes needs even latent sides with shares, got {self.sizes!r}")
        return shares

    def progress(self, index: int, seconds: float) -> float:
        """How far the stage is, 0 to 1, at its step ``index``: by steps or by time."""
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(index / self.steps, by_time))

    def learning_rate(self, index: int, seconds: float) -> float:
        """Rate of the stage's step ``index``: linear warmup, then linear from lr to lr_end."""
        ramp = min(1.0, (index + 1) / self.warmup) if self.warmup else 1.0
        return ramp * (self.lr + (self.lr_end - self.lr) * self.progress(index, seconds))


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


def init_weights(flux: Any, seed: int) -> None:
    """Fill an uninitialised Flux: Xavier, modulations at zero (adaLN-zero), a head start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in flux.named_parameters():
        zeroed = ".lin." in f".{name}" or name.startswith("final_layer.")
        with torch.no_grad():
            if "_norm." in name:
                parameter.fill_(1.0)
            elif zeroed or name.endswith(".bias"):
                parameter.zero_()
            else:
                limit = math.sqrt(6.0 / sum(parameter.shape))
                parameter.uniform_(-limit, limit, generator=generator)
    _init_pass_through(flux)
    _init_anchor_heads(flux)


@torch.no_grad()
def _init_pass_through(flux: Any) -> None:
    """Start with the output equal to the input: most of a velocity is the noise itself.

    Input and output share one orthonormal basis. The input's bias, orthogonal to it and large,
    keeps the final layer norm from dividing each token by its own length.
    """
    generator = torch.Generator().manual_seed(2)
    width = flux.img_in.weight.shape[1]
    basis = torch.empty(flux.hidden_size, width + 2)
    nn.init.orthogonal_(basis, generator=generator)
    # A layer norm takes the mean away, so nothing may lie along the constant vector.
    basis[:, 0] = 1.0
    basis = torch.linalg.qr(basis)[0]
    steady, image = basis[:, 1], basis[:, 2:]
    flux.img_in.weight.copy_(image)
    flux.img_in.bias.copy_(steady * math.sqrt(flux.hidden_size))
    typical = math.sqrt((flux.hidden_size + width) / flux.hidden_size)
    flux.final_layer.linear.weight.copy_(image.T * typical)


@torch.no_grad()
def _init_anchor_heads(flux: Any) -> None:
    """Start head 0 of every double block as a finder of places (see ``prompt``).

    An image token's query begins nearly constant in the anchors' rotary pairs and a text token's
    key copies its anchor there, so that after rotary embedding their product is the cosine of
    their distance, summed over the anchor's frequencies. It is a starting point only: training
    may change all of it.
    """
    width = 2 * len(ANCHOR_PAIRS)
    # Semi-orthogonal, so that a part of a token can be read off its projection.
    nn.init.orthogonal_(flux.txt_in.weight, gain=2.0, generator=torch.Generator().manual_seed(1))
    for channel in range(2 * width):
        flux.txt_in.weight[channel] = 0.0
        flux.txt_in.weight[channel, ANCHOR_X_AT + channel] = 1.5
    head_dim = flux.hidden_size // flux.num_heads
    time_dims = flux.params.axes_dim[0]
    head = slice(0, head_dim)
    keys = slice(flux.hidden_size, flux.hidden_size + head_dim)
    for block in flux.double_blocks:
        image, text = block.img_attn.qkv, block.txt_attn.qkv
        image.weight[head] *= 0.3
        text.weight[keys] *= 0.3
        for axis, channel in ((1, 0), (0, width)):
            for index, pair in enumerate(ANCHOR_PAIRS):
                at = time_dims + axis * AXIS_DIM + 2 * pair
                image.bias[at] = 3.0
                for part in (0, 1):
                    text.weight[keys][at + part] = 0.0
                    text.weight[keys][at + part, channel + 2 * index + part] = 3.0
        # Rotary position never turns the first dimensions: a constant there keeps image keys out.
        image.weight[keys] = 0.0
        image.bias[0], image.bias[keys][0] = 1.5, -1.0
        for mod in (block.img_mod, block.txt_mod):
            mod.lin.bias.view(6, -1)[[2, 5]] = 0.5
    for block in flux.single_blocks:
        block.modulation.lin.bias.view(3, -1)[2] = 0.5


def plain_attention(
    func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
) -> Tensor:
    """Exact attention in two matrix products: q, k, v [B, H, N, D] → [B, N, H·D].

    Forwards and backwards on a CPU it takes half the time of torch's fused attention.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out = scores.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def attention_options(device: torch.device) -> dict[str, Any]:
    """``transformer_options`` that make a training step fastest on this device."""
    return {"optimized_attention_override": plain_attention} if device.type == "cpu" else {}


class _OutOfPlace(ast.NodeTransformer):
    """Turns ``name += value`` into ``name = name + value``."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.target, ast.Name):
            return node
        read = ast.Name(node.target.id, ast.Load())
        value = ast.BinOp(read, node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)


def add_out_of_place(flux: Any) -> None:
    """Make the blocks' residual additions differentiable, on these instances alone.

    ComfyUI's blocks add in place to tensors that a backward pass still needs. Torch's own remedy
    (``allow_mutation_on_saved_tensors``) copies them and slows every operation down.
    """
    forwards: dict[type, Any] = {}
    for block in (*flux.double_blocks, *flux.single_blocks):
        kind = type(block)
        if kind not in forwards:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
            tree = ast.fix_missing_locations(_OutOfPlace().visit(tree))
            scope: dict[str, Any] = {}
            exec(compile(tree, inspect.getfile(kind), "exec"), kind.forward.__globals__, scope)
            forwards[kind] = scope["forward"]
        block.forward = types.MethodType(forwards[kind], block)


def draw_times(count: int, cells: int, rng: np.random.Generator) -> Tensor:
    """Noise levels [count] in 0..1: logit-normal, pushed up as the picture grows.

    More cells show the same layout through more noise, so a large picture's layout is decided at
    higher levels.
    """
    normal = 1.0 / (1.0 + np.exp(-rng.normal(0.0, 1.3, count)))
    even = rng.random(count)
    times = np.where(rng.random(count) < 0.2, even, normal)
    shift = 3.0 * math.sqrt(cells / 16)
    times = shift * times / (1 + (shift - 1) * times)
    return torch.from_numpy(times.astype(np.float32))


class Prompts:
    """Prompt embeddings, kept: the grammar is small."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def batch(self, texts: list[str], cells: int) -> tuple[Tensor, Tensor]:
        for text in texts:
            if (text, cells) not in self._known:
                side = cells * CELL
                self._known[text, cells] = encode_prompt(text, side, side)
        pairs = [self._known[text, cells] for text in texts]
        return torch.stack([c for c, _ in pairs]), torch.stack([p for _, p in pairs])


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


class Batches(Dataset[tuple[Tensor, Tensor, Tensor, list[str]]]):
    """A stage's batches by its step: clean latents and noise [B, 16, h, w], times [B], prompts.

    Each step has a generator of its own, so that neither a resumed run nor the number of worker
    processes changes what is drawn.
    """

    def __init__(self, stage: Stage, codec: LinearCodec, first_step: int) -> None:
        """first_step: training steps that came before the stage's own first."""
        self.stage, self.codec, self.first_step = stage, codec, first_step

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        stage = self.stage
        rng = np.random.default_rng([stage.seed, self.first_step + index])
        shares = stage.size_shares()
        weights = np.array(list(shares.values()))
        cells = int(rng.choice(list(shares), p=weights / weights.sum()))
        count = max(1, stage.batch_tokens // (cells * cells // 4 + 16))
        side = cells * CELL
        captions = [sample_caption(rng) for _ in range(count)]
        # One by one: a batch of large pictures does not fit a processor's cache.
        clean = [
            self.codec.encode(torch.from_numpy(render(caption, side, side, rng))[None])
            for caption in captions
        ]
        kept = rng.random(count) >= stage.dropout
        prompts = [c.text if keep else "" for c, keep in zip(captions, kept, strict=True)]
        noise = rng.standard_normal((count, CHANNELS, cells, cells), dtype=np.float32)
        return torch.cat(clean), torch.from_numpy(noise), draw_times(count, cells, rng), prompts


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
