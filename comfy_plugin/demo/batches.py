"""What a stage of training draws: captions, pictures, noise and noise levels, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .captions import sample_caption
from .codec import CELL, CHANNELS, LinearCodec
from .pictures import render
from .prompt import encode_prompt


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
