"""A transformer of Flux.1's shape with random weights, for timing whole forward passes.

19 blocks that keep text and image apart but for attention and 38 that join them, 3,072 wide, 24
heads, an MLP four times as wide, modulation by a vector, RMS-normed and rotated query and key:
the products and the element-wise work of the real model, in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

WIDTH, HEADS, HEAD_DIM, MLP = 3072, 24, 128, 12_288
DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38
AXES, THETA = (16, 56, 56), 10_000.0
CHANNELS, CONTEXT, VECTOR = 64, 4096, 768

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of one forward pass.

    Attributes:
        image: ``[1, image tokens, 64]``.
        text: ``[1, text tokens, 4096]``.
        vector: ``[1, 768]``.
        cosine: ``[tokens, 64]`` float32, text first.
        sine: likewise.
    """

    image: torch.Tensor
    text: torch.Tensor
    vector: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor


class FluxShaped:
    """The model; weights are made on the device."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(0)
        self._image_in, self._text_in = self._linear(CHANNELS, WIDTH), self._linear(CONTEXT, WIDTH)
        self._vector_in = self._linear(VECTOR, WIDTH)
        self._double = [
            [self._stream_weights() for _ in ("image", "text")] for _ in range(DOUBLE_BLOCKS)
        ]
        self._single = [
            {
                "modulation": self._linear(WIDTH, 3 * WIDTH),
                "first": self._linear(WIDTH, 3 * WIDTH + MLP),
                "second": self._linear(WIDTH + MLP, WIDTH),
            }
            for _ in range(SINGLE_BLOCKS)
        ]
        self._last = self._linear(WIDTH, CHANNELS)

    def _linear(self, inner: int, outer: int) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"dtype": self._dtype, "device": self._device}
        weight = torch.empty(outer, inner, **options)
        weight.normal_(0.0, inner**-0.5, generator=self._generator)
        return weight, torch.zeros(outer, **options)

    def _stream_weights(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            "modulation": self._linear(WIDTH, 6 * WIDTH),
            "qkv": self._linear(WIDTH, 3 * WIDTH),
            "out": self._linear(WIDTH, WIDTH),
            "up": self._linear(WIDTH, MLP),
            "down": self._linear(MLP, WIDTH),
        }

    def inputs(self, rows: int, columns: int, text: int) -> Inputs:
        """Random inputs for a grid of so many image tokens."""
        options = {"dtype": self._dtype, "device": self._device, "generator": self._generator}
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1)
        ids = torch.cat([torch.zeros(text, 3, dtype=ids.dtype), ids]).double()
        angles = torch.cat(
            [
                ids[:, axis, None]
                / THETA ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
                for axis, width in enumerate(AXES)
            ],
            dim=1,
        )
        return Inputs(
            torch.randn(1, rows * columns, CHANNELS, **options),
            torch.randn(1, text, CONTEXT, **options),
            torch.randn(1, VECTOR, **options),
            angles.cos().float().to(self._device),
            angles.sin().float().to(self._device),
        )

    def forward(self, inputs: Inputs, attention: Attention) -> torch.Tensor:
        """One pass: ``[1, image tokens, 64]``."""
        image = functional.linear(inputs.image, *self._image_in)
        text = functional.linear(inputs.text, *self._text_in)
        vector = functional.silu(functional.linear(inputs.vector, *self._vector_in))
        count = text.shape[1]
        for weights in self._double:
            image, text = self._double_block(weights, image, text, vector, inputs, attention)
        joined = torch.cat([text, image], dim=1)
        for single in self._single:
            joined = self._single_block(single, joined, vector, inputs, attention)
        return functional.linear(_norm(joined[:, count:]), *self._last)

    def _double_block(
        self,
        weights: list[dict[str, tuple[torch.Tensor, torch.Tensor]]],
        image: torch.Tensor,
        text: torch.Tensor,
        vector: torch.Tensor,
        inputs: Inputs,
        attention: Attention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        streams = [text, image]
        own = [weights[1], weights[0]]
        modulations = [
            functional.linear(vector, *part["modulation"]).unsqueeze(1).chunk(6, dim=-1)
            for part in own
        ]
        heads = [
            _heads(functional.linear(_modulate(x, m[0], m[1]), *part["qkv"]))
            for x, m, part in zip(streams, modulations, own, strict=True)
        ]
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        attended = _attend(query, key, value, inputs, attention)
        parts = attended.split([x.shape[1] for x in streams], dim=1)
        done = []
        for x, part, m, stream in zip(streams, parts, modulations, own, strict=True):
            x = torch.addcmul(x, m[2], functional.linear(part, *stream["out"]))
            hidden = functional.linear(_modulate(x, m[3], m[4]), *stream["up"])
            hidden = functional.gelu(hidden, approximate="tanh")
            done.append(torch.addcmul(x, m[5], functional.linear(hidden, *stream["down"])))
        return done[1], done[0]

    def _single_block(
        self,
        weights: dict[str, tuple[torch.Tensor, torch.Tensor]],
        x: torch.Tensor,
        vector: torch.Tensor,
        inputs: Inputs,
        attention: Attention,
    ) -> torch.Tensor:
        shift, factor, gate = (
            functional.linear(vector, *weights["modulation"]).unsqueeze(1).chunk(3, dim=-1)
        )
        first = functional.linear(_modulate(x, shift, factor), *weights["first"])
        qkv, hidden = first.split([3 * WIDTH, MLP], dim=-1)
        attended = _attend(*_heads(qkv), inputs, attention)
        hidden = functional.gelu(hidden, approximate="tanh")
        joined = torch.cat([attended, hidden], dim=-1)
        return torch.addcmul(x, gate, functional.linear(joined, *weights["second"]))


def _norm(x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def _modulate(x: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, 1 + factor, _norm(x))


def _heads(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query and key, RMS-normed, and value: ``[1, H, n, D]`` each."""
    query, key, value = qkv.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    return _rms(query), _rms(key), value


def _rms(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:])


def _rotate(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Rotary embedding in float32, neighbouring channels in pairs."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.empty(*even.shape, 2, dtype=torch.float32, device=x.device)
    torch.mul(even, inputs.cosine, out=turned[..., 0]).addcmul_(odd, inputs.sine, value=-1)
    torch.mul(even, inputs.sine, out=turned[..., 1]).addcmul_(odd, inputs.cosine)
    return turned.flatten(-2).to(x.dtype)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    inputs: Inputs,
    attention: Attention,
) -> torch.Tensor:
    attended = attention(_rotate(query, inputs), _rotate(key, inputs), value)
    return attended.transpose(1, 2).flatten(2)
