"""A linear codec between RGB pictures and 16-channel latents, 8×8 pixels to a latent cell.

Each cell's 192 values are projected on the 16 principal components of rendered pictures. The
components are whitened only in part: full whitening would make the rare, faint edge components
as loud as the layout, and the model would spend itself on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .captions import sample_caption
from .pictures import render

CELL = 8
CHANNELS = 16
WHITENING = 0.5
"""0 keeps the components' variances, 1 makes them all equal."""


@dataclass(frozen=True)
class LinearCodec:
    """mean [192], to_latent [192, 16] and to_pixels [16, 192]; float32, pixels in −1..1.

    A cell's 192 values are ordered (row, column, RGB).
    """

    mean: Tensor
    to_latent: Tensor
    to_pixels: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, H, W, 3] in 0..1 (sides multiples of 8) → latents [B, 16, H/8, W/8]."""
        batch, height, width, colours = images.shape
        if height % CELL or width % CELL or colours != 3:
            raise ValueError(
                f"The demo codec takes RGB images with sides that are multiples of {CELL}, "
                f"got {width}×{height} with {colours} channels."
            )
        cells = (images.float() * 2 - 1).reshape(
            batch, height // CELL, CELL, width // CELL, CELL, colours
        )
        flat = cells.permute(0, 1, 3, 2, 4, 5).flatten(3)
        mean, basis = self.mean.to(flat.device), self.to_latent.to(flat.device)
        return ((flat - mean) @ basis).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, h, w] → images [B, 8h, 8w, 3], float32, clipped to 0..1."""
        batch, channels, rows, columns = latents.shape
        if channels != CHANNELS:
            raise ValueError(f"The demo codec decodes {CHANNELS} channels, got {channels}.")
        values = latents.float().permute(0, 2, 3, 1)
        flat = values @ self.to_pixels.to(values.device) + self.mean.to(values.device)
        cells = flat.reshape(batch, rows, columns, CELL, CELL, 3).permute(0, 1, 3, 2, 4, 5)
        return ((cells.reshape(batch, rows * CELL, columns * CELL, 3) + 1) / 2).clamp(0, 1)

    def preview_factors(self) -> tuple[list[list[float]], list[float]]:
        """Factors [16][3] and bias [3] from a latent cell to its mean colour in −1..1."""
        factors = self.to_pixels.reshape(CHANNELS, CELL * CELL, 3).mean(1)
        bias = self.mean.reshape(CELL * CELL, 3).mean(0)
        return factors.tolist(), bias.tolist()


def fit_codec(seed: int, pictures: int = 400, side: int = 256) -> LinearCodec:
    """Principal components of pictures of training captions; deterministic in its seed."""
    rng = np.random.default_rng(seed)
    total = torch.zeros(3 * CELL * CELL, dtype=torch.float64)
    square = torch.zeros(3 * CELL * CELL, 3 * CELL * CELL, dtype=torch.float64)
    count = 0
    for _ in range(pictures):
        image = torch.from_numpy(render(sample_caption(rng), side, side, rng)) * 2 - 1
        cells = image.reshape(side // CELL, CELL, side // CELL, CELL, 3)
        flat = cells.permute(0, 2, 1, 3, 4).reshape(-1, 3 * CELL * CELL).double()
        total += flat.sum(0)
        square += flat.T @ flat
        count += flat.shape[0]
    mean = total / count
    values, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    # An eigenvector's sign is arbitrary and differs between LAPACK builds: fix it.
    signs = torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
    vectors = vectors * signs
    spread = values.clamp_min(1e-12).sqrt()
    scale = spread ** (1 - WHITENING)
    scale = scale / (scale**2).mean().sqrt()
    gain = scale / spread
    return LinearCodec(
        mean=mean.float(),
        to_latent=(vectors * gain).float().contiguous(),
        to_pixels=(vectors / gain).T.float().contiguous(),
    )
