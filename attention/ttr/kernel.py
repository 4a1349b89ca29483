"""The kernel student: normalised regression by learnt positive features, and landmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import elu
from torch.utils.checkpoint import checkpoint

from ..reasons import Fallback
from ..taylor.kernel import accumulation_dtype
from ..token_layout import TokenLayout
from .residual import refuses_layout
from .student import Prediction, Rows, Served, Student, StudentOptions

_FIRST_SHARE = -2.0

_FLOOR = 1e-12
"""Least denominator."""


class KernelStudent(Student):
    """``(1 - a)·kernel + a·landmarks``, each a mean of values with weights that sum to 1.

    The kernel's weights are φ_q(q)·φ_k(k) over all keys with φ(x) = elu(Wx + b) + 1, W and b of
    each head and side. The landmarks' are a softmax over some of the keys: all of the text, and
    image tokens evenly spread. The share a of each head is the sigmoid of a parameter.

    The chunk bounds the queries that an update holds at once.
    """

    kind: ClassVar[str] = "kernel"

    def __init__(self, options: StudentOptions, generator: torch.Generator) -> None:
        super().__init__(options, generator)
        shape = (options.heads, options.features, options.head_dim)

        def maps() -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[2]))

        self.query_map, self.key_map = maps(), maps()
        self.query_bias = nn.Parameter(torch.zeros(options.heads, options.features))
        self.key_bias = nn.Parameter(torch.zeros(options.heads, options.features))
        self.share = nn.Parameter(torch.full((options.heads,), _FIRST_SHARE))

    def share_parameters(self) -> list[nn.Parameter]:
        return [self.share]

    def refuses(
        self, query_shape: Sequence[int], key_shape: Sequence[int], layout: TokenLayout | None
    ) -> tuple[Fallback, str] | None:
        return refuses_layout(query_shape, key_shape, layout)

    def predict(self, rows: Rows, chunk: int) -> Prediction:
        root = math.sqrt(rows.scale)
        numerator, denominator = self._sums(rows.key * root, rows.value)
        places = self._landmarks(rows)
        key, value = rows.key[:, :, places] * root, rows.value[:, :, places]
        parts, queries, shares = [], rows.query.shape[2], self._shares(places)
        for first in range(0, queries, chunk):
            query = rows.query[:, :, first : first + chunk] * root
            arguments = (query, key, value, numerator, denominator, shares)
            if torch.is_grad_enabled() and chunk < queries:
                parts.append(checkpoint(self._attend, *arguments, use_reentrant=False))
            else:
                parts.append(self._attend(*arguments))
        return Prediction(torch.cat(parts, dim=2))

    @torch.no_grad()
    def weights(self, rows: Rows) -> torch.Tensor:
        root = math.sqrt(rows.scale)
        query, key = rows.query * root, rows.key * root
        of_queries = _features(query, self.query_map, self.query_bias)
        of_keys = _features(key, self.key_map, self.key_bias)
        kernel = of_queries @ of_keys.transpose(-2, -1)
        kernel /= kernel.sum(dim=-1, keepdim=True).clamp_min(_FLOOR)
        places = self._landmarks(rows)
        some = torch.softmax(query @ key[:, :, places].transpose(-2, -1), dim=-1)
        share = self._shares(places)
        return (kernel * (1.0 - share)).index_add_(3, places, some * share)

    @torch.no_grad()
    def serve(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        layout: TokenLayout | None,
        chunk: int,
        log_mass_rows: torch.Tensor | None = None,
    ) -> Served:
        assert layout is not None
        dtype, root = accumulation_dtype(query.dtype), math.sqrt(scale)
        places = landmark_places(layout, self.options.landmarks, query.device)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, places], value[:, :, places], scale=scale
        )
        batch, heads, tokens, _ = query.shape
        step = self._heads_at_a_time(tokens, query.dtype)
        shares = self._shares(places).to(dtype)
        for row in range(batch):
            for head in range(0, heads, step):
                some = slice(head, min(head + step, heads))
                q, k, v = (x[row, some].to(dtype) for x in (query, key, value))
                kernel = self._regress(q.mul(root), k.mul(root), v, some)
                out[row, some] = torch.lerp(kernel, out[row, some].to(dtype), shares[some])
        return Served(out)

    def training_bytes(self, query_shape: Sequence[int], queries: int, chunk: int) -> int:
        batch, heads, tokens, width = query_shape
        features, chunk = self.options.features, min(chunk, queries)
        text_and_landmarks = min(tokens, self.options.landmarks + _USUAL_TEXT)
        # Keys times the scale's root and their features, in two layers; then queries' features and
        # products with landmarks, or the gradient of the keys' features.
        of_keys = tokens * (width + 2 * features)
        of_queries = chunk * (4 * features + 2 * text_and_landmarks) + queries * 6 * width
        return 4 * batch * heads * (of_keys + max(tokens * features, of_queries))

    def serving_bytes(
        self,
        query_shape: Sequence[int],
        dtype: torch.dtype,
        layout: TokenLayout | None,
        chunk: int,
    ) -> int:
        batch, heads, tokens, width = query_shape
        group = self._heads_at_a_time(tokens, dtype)
        out = batch * heads * tokens * width * dtype.itemsize
        return out + group * self._head_bytes(tokens, dtype)

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        options: StudentOptions,
        layout: TokenLayout | None,
    ) -> float:
        """Products of the maps, of the features and with the landmarks."""
        if layout is None:
            raise ValueError("layout: is None; allowed: a layout, which the cost depends on")
        batch, heads, tokens, width = query_shape
        landmarks = layout.text_tokens + min(options.landmarks, layout.image_tokens)
        return batch * heads * 4.0 * tokens * width * (2.0 * options.features + landmarks)

    def _heads_at_a_time(self, tokens: int, dtype: torch.dtype) -> int:
        return max(1, min(self.options.heads, _SERVING_BYTES // self._head_bytes(tokens, dtype)))

    def _head_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What serving holds of a head: copies, features in two layers, or features and output."""
        wide, width, features = (
            accumulation_dtype(dtype),
            self.options.head_dim,
            self.options.features,
        )
        copies = 0 if dtype == wide else 3 * width
        return wide.itemsize * tokens * (copies + features + 2 * width + max(features, width))

    def _regress(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: slice
    ) -> torch.Tensor:
        """The kernel's part of some heads, ``[G, N, D]`` each."""
        dtype = query.dtype
        of_keys = _features(key, self.key_map[heads].to(dtype), self.key_bias[heads].to(dtype))
        numerator = of_keys.transpose(-2, -1) @ value
        denominator = of_keys.sum(dim=-2).unsqueeze(-1)
        del of_keys
        maps, bias = self.query_map[heads].to(dtype), self.query_bias[heads].to(dtype)
        of_queries = _features(query, maps, bias)
        mass = (of_queries @ denominator).clamp_min_(_FLOOR)
        return (of_queries @ numerator).div_(mass)

    def _sums(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ φ(k)·vᵀ ``[B, H, F, D]`` and Σ φ(k) ``[B, H, F, 1]``."""
        of_keys = _features(key, self.key_map, self.key_bias)
        return of_keys.transpose(-2, -1) @ value, of_keys.sum(dim=-2).unsqueeze(-1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        numerator: torch.Tensor,
        denominator: torch.Tensor,
        shares: torch.Tensor,
    ) -> torch.Tensor:
        of_queries = _features(query, self.query_map, self.query_bias)
        kernel = (of_queries @ numerator) / (of_queries @ denominator).clamp_min(_FLOOR)
        with torch.no_grad():
            exact = torch.softmax(query @ key.transpose(-2, -1), dim=-1) @ value
        return torch.lerp(kernel, exact, shares)

    def _shares(self, places: torch.Tensor) -> torch.Tensor:
        """The landmarks' share, ``[H, 1, 1]``: none where there are no landmarks."""
        shares = torch.sigmoid(self.share).view(-1, 1, 1)
        return shares if len(places) else shares * 0.0

    def _landmarks(self, rows: Rows) -> torch.Tensor:
        assert rows.layout is not None
        return landmark_places(rows.layout, self.options.landmarks, rows.index.device)


_SERVING_BYTES = 1024 * 2**20
"""Of the heads that are served at a time."""

_USUAL_TEXT = 512
"""Text tokens that an estimate without a layout counts with."""


def _features(x: torch.Tensor, maps: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``elu(x·Wᵀ + b) + 1``: ``[…, H, N, F]`` of ``[…, H, N, D]``."""
    return elu(torch.matmul(x, maps.transpose(-2, -1)) + bias.unsqueeze(-2)) + 1.0


@lru_cache(maxsize=32)
def landmark_places(layout: TokenLayout, most: int, device: torch.device) -> torch.Tensor:
    """The keys that are attended to exactly: the text and evenly spread image tokens.

    Args:
        layout: of the tokens.
        most: image tokens.
        device: of the answer, which is kept.

    Returns:
        ``[L]`` int64, ascending.
    """
    with torch.inference_mode(False):
        text, image = layout.text_tokens, layout.image_tokens
        count = min(most, image)
        # The middle of each of so many equal parts.
        spread = (2 * torch.arange(count) + 1) * image // (2 * max(1, count))
        return torch.cat([torch.arange(text), text + spread]).to(device)
