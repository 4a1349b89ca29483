"""Structured synthetic query, key and value: heads that behave like those of a diffusion model.

Isotropic noise says little about attention in a picture, where neighbours look alike, text comes
first and each head has a mean of its own. This set has these properties and a chosen spread of
the logits, which decides how hard a head is to approximate:

- tokens: ``text_tokens`` of text, then a grid of image tokens in order of 8×8 tiles;
- content c of rank 24 per token: text rows are i.i.d. normal; each channel of the image rows is a
  Gaussian random field of unit variance with the power spectrum exp(-(4πf)²) in one half of the
  channels and exp(-(1.5πf)²) in the other, f in cycles per token;
- q = c·Wq + μq + 0.5·noise, k = c·Wk + μk + 0.5·noise, where Wk and μk share 0.7 of Wq and μq;
- v = c·Wv + 0.5·noise + a constant row of standard deviation 0.3;
- q and k are RMS-normed and rotated (RoPE, axes 16 + 56 + 56, θ = 10⁴) by the ids (0, y, x), text
  by (0, 0, 0);
- last, one factor on both gives the logits the wished standard deviation.

Everything is computed in float64 on the CPU, so that a seed means the same tensors everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .token_layout import TokenLayout

Kind = Literal["content", "positional", "iso"]
"""``content``: what a token shows decides. ``positional``: the means are twice as large, so that
rotation by place decides more. ``iso``: q, k and v are i.i.d. normal, without any structure."""

KINDS: tuple[str, ...] = get_args(Kind)

TILE = 8
RANK = 24
AXES = (16, 56, 56)
THETA = 10_000.0
TEXT_TOKENS = 256

_NOISE = 0.5
_MEAN = 0.8
_SHARED = 0.7
_COARSE, _FINE = 4.0, 1.5


@dataclass(frozen=True, slots=True)
class StructuredTensors:
    """A set of heads.

    Attributes:
        query: ``[1, H, N, D]`` with N = text_tokens + rows·columns and D = Σ axes.
        key: the same shape.
        value: the same shape.
        scale: factor on q·k: D^-½.
        ids: ``[N, 3]`` int64: the place (0, y, x) of each token; zeros for text.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    ids: torch.Tensor


def in_raster_order(made: StructuredTensors) -> tuple[StructuredTensors, TokenLayout]:
    """The same tokens, the image row by row as in a model, and where they stand."""
    places = made.ids[:, 1:]
    rows, columns = (int(size) + 1 for size in places.amax(dim=0))
    text = len(places) - rows * columns
    image = torch.argsort(places[text:, 0] * columns + places[text:, 1]) + text
    order = torch.cat([torch.arange(text), image])
    query, key, value = (x[:, :, order] for x in (made.query, made.key, made.value))
    raster = StructuredTensors(query, key, value, made.scale, made.ids[order])
    return raster, TokenLayout(text, ((rows, columns),))


def before_rotation(made: StructuredTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key as they were before rotary embedding, turned back from what they are."""
    query, key = (rotate(x.double(), -made.ids).to(x.dtype) for x in (made.query, made.key))
    return query, key


def token_ids(rows: int, columns: int, text_tokens: int) -> torch.Tensor:
    """Places of all tokens, ``[text_tokens + rows·columns, 3]`` int64, image in order of tiles."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image = torch.stack([torch.zeros_like(y), y, x], dim=-1)
    return torch.cat([image.new_zeros(text_tokens, 3), _tile_order(image)])


def _tile_order(grid: torch.Tensor) -> torch.Tensor:
    """``[rows, columns, C]`` as ``[rows·columns, C]``, tile by tile, each tile row by row."""
    rows, columns, channels = grid.shape
    tiles = grid.reshape(rows // TILE, TILE, columns // TILE, TILE, channels)
    return tiles.transpose(1, 2).reshape(rows * columns, channels)


def random_fields(
    rows: int, columns: int, count: int, width: float, generator: torch.Generator
) -> torch.Tensor:
    """Periodic Gaussian random fields of power spectrum exp(-(width·π·f)²), at unit variance.

    Args:
        rows: of the grid.
        columns: of the grid.
        count: how many.
        width: the larger, the smoother the field. f is in cycles per token.
        generator: of the noise.

    Returns:
        ``[rows, columns, count]`` float64.
    """
    noise = torch.randn(rows, columns, count, generator=generator, dtype=torch.float64)
    vertical = torch.fft.fftfreq(rows, dtype=torch.float64)[:, None]
    horizontal = torch.fft.fftfreq(columns, dtype=torch.float64)[None, :]
    squared = vertical.square() + horizontal.square()
    # The amplitudes' factor is the root of the power's.
    response = torch.exp(-0.5 * (width * math.pi) ** 2 * squared)[..., None]
    spectrum = torch.fft.fft2(noise, dim=(0, 1)) * response
    fields: torch.Tensor = torch.fft.ifft2(spectrum, dim=(0, 1)).real
    return fields / fields.std(dim=(0, 1), correction=0)


def rotate(
    x: torch.Tensor, ids: torch.Tensor, axes: Sequence[int] = AXES, theta: float = THETA
) -> torch.Tensor:
    """Rotary embedding as Flux applies it: neighbouring channels are the pairs.

    Args:
        x: ``[..., N, Σ axes]``.
        ids: ``[N, len(axes)]``.
        axes: channels that each id turns; even.
        theta: base of the frequencies.

    Returns:
        Like ``x``.
    """
    angles = torch.cat(
        [
            ids[:, axis, None].to(x.dtype)
            * theta ** (-torch.arange(0, size, 2, dtype=x.dtype, device=x.device) / size)
            for axis, size in enumerate(axes)
        ],
        dim=-1,
    )
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2)


def logit_std(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Standard deviation of scale·q·k after each row's mean is subtracted, over all pairs.

    With k̄ the mean key, it is the square root of ``mean((q·(k - k̄))²)``, which the two second
    moments give without the logits: ``tr(E[q qᵀ] · Cov(k))``.

    Args:
        query: ``[..., Nq, D]``.
        key: ``[..., Nk, D]``.
        scale: factor on q·k.

    Returns:
        ``[...]``, one per head.
    """
    centred = key - key.mean(dim=-2, keepdim=True)
    queries = query.transpose(-2, -1) @ query / query.shape[-2]
    keys = centred.transpose(-2, -1) @ centred / key.shape[-2]
    return abs(scale) * (queries * keys).sum(dim=(-2, -1)).sqrt()


def structured_qkv(
    kind: Kind,
    std: float,
    *,
    rows: int = 64,
    columns: int = 64,
    text_tokens: int = TEXT_TOKENS,
    heads: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> StructuredTensors:
    """Make a set of heads.

    Args:
        kind: see `Kind`.
        std: standard deviation that the scaled logits shall have, each row's mean subtracted.
        rows: of the image grid; a multiple of 8.
        columns: of the image grid; a multiple of 8. 64×64 makes 4,352 tokens, 104×160 16,896.
        text_tokens: before the image.
        heads: how many; head h of a seed is the same however many there are.
        seed: of everything random.
        dtype: of the answer; the computation is in float64.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    _check(kind, std, rows, columns, text_tokens, heads)
    ids = token_ids(rows, columns, text_tokens)
    scale = sum(AXES) ** -0.5
    made = []
    for head in range(heads):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + head)
        if kind == "iso":
            query, key, value = torch.randn(
                3, len(ids), sum(AXES), generator=generator, dtype=torch.float64
            ).unbind(0)
        else:
            query, key, value = _head(kind, rows, columns, ids, generator)
        factor = (std / logit_std(query, key, scale)).sqrt()
        made.append(torch.stack([query * factor, key * factor, value]))
    query, key, value = torch.stack(made, dim=1).to(dtype)[:, None].unbind(0)
    return StructuredTensors(query, key, value, scale, ids)


def _check(kind: str, std: float, rows: int, columns: int, text_tokens: int, heads: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: is {kind!r}; allowed: {', '.join(KINDS)}")
    if not 0.0 < std < math.inf:
        raise ValueError(f"std: is {std!r}; allowed: a number above 0")
    for name, size in (("rows", rows), ("columns", columns)):
        if size < TILE or size % TILE:
            raise ValueError(f"{name}: is {size!r}; allowed: a multiple of {TILE}")
    if text_tokens < 0:
        raise ValueError(f"text_tokens: is {text_tokens!r}; allowed: a whole number from 0")
    if heads < 1:
        raise ValueError(f"heads: is {heads!r}; allowed: a whole number from 1")


def _head(
    kind: str, rows: int, columns: int, ids: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = sum(AXES)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image = torch.cat(
        [random_fields(rows, columns, RANK // 2, width, generator) for width in (_COARSE, _FINE)],
        dim=-1,
    )
    content = torch.cat([normal(len(ids) - rows * columns, RANK), _tile_order(image)])
    query_map = normal(RANK, width) / RANK**0.5
    key_map = _SHARED * query_map + _SHARED * normal(RANK, width) / RANK**0.5
    value_map = normal(RANK, width) / RANK**0.5
    query_mean = _MEAN * normal(width)
    key_mean = _SHARED * query_mean + _SHARED * _MEAN * normal(width)
    if kind == "positional":
        query_mean, key_mean = 2 * query_mean, 2 * key_mean
    noise = _NOISE * normal(3, len(ids), width)
    query = _rms_norm(content @ query_map + query_mean + noise[0])
    key = _rms_norm(content @ key_map + key_mean + noise[1])
    value = content @ value_map + noise[2] + 0.3 * normal(width)
    return rotate(query, ids), rotate(key, ids), value


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()
