"""A small student for tests: linear attention with a learnt positive feature map for each head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn

from attnscope.attention.reasons import Fallback
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr.student import Prediction, Rows, Served, Student, StudentOptions


class LinearStudent(Student):
    """out = φ(q)·Σ φ(k)·vᵀ / φ(q)·Σ φ(k) with φ(x) = exp(W·x), a matrix W for each head.

    The chunk bounds the queries that are predicted at once. ``allocating`` is called with
    "training" or "serving" and the chunk before anything is computed, so that a test can have
    memory run out there.
    """

    kind: ClassVar[str] = "residual"
    allocating: ClassVar[Callable[[str, int], None]] = staticmethod(lambda what, chunk: None)

    def __init__(self, options: StudentOptions, generator: torch.Generator) -> None:
        super().__init__(options, generator)
        shape = (options.heads, options.head_dim, options.features)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) * 0.1)
        self.share = nn.Parameter(torch.zeros(options.heads))

    def refuses(
        self, query_shape: Sequence[int], key_shape: Sequence[int], layout: TokenLayout | None
    ) -> tuple[Fallback, str] | None:
        return (Fallback.LAYOUT, "no layout") if layout is None else None

    def share_parameters(self) -> list[nn.Parameter]:
        return [self.share]

    def _features(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.exp((x * scale**0.5 @ self.weight.to(x.dtype)).clamp(-15, 15))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, queries = self._features(key, scale), self._features(query, scale)
        mean = value.mean(dim=2, keepdim=True)
        mass = queries @ keys.sum(dim=2).unsqueeze(-1)
        out = queries @ (keys.transpose(-2, -1) @ value) / mass
        share = torch.sigmoid(self.share).to(out.dtype)[:, None, None]
        return out + share * 0.01 * (mean - out), mass.squeeze(-1).float().log()

    def predict(self, rows: Rows, chunk: int) -> Prediction:
        type(self).allocating("training", chunk)
        parts = [
            self._attend(rows.query[:, :, start : start + chunk], rows.key, rows.value, rows.scale)
            for start in range(0, rows.query.shape[2], chunk)
        ]
        outs, masses = zip(*parts, strict=True)
        return Prediction(torch.cat(outs, dim=2), torch.cat(masses, dim=2))

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
        type(self).allocating("serving", chunk)
        out, mass = self._attend(query, key, value, scale)
        return Served(out, None if log_mass_rows is None else mass[:, :, log_mass_rows])

    def weights(self, rows: Rows) -> torch.Tensor | None:
        queries = self._features(rows.query, rows.scale)
        weights = queries @ self._features(rows.key, rows.scale).transpose(-2, -1)
        return weights / weights.sum(dim=-1, keepdim=True)

    def training_bytes(self, query_shape: Sequence[int], queries: int, chunk: int) -> int:
        batch, heads, tokens, width = query_shape
        return 8 * batch * heads * (tokens + queries) * (width + self.options.features)

    def serving_bytes(
        self,
        query_shape: Sequence[int],
        dtype: torch.dtype,
        layout: TokenLayout | None,
        chunk: int,
    ) -> int:
        return self.training_bytes(query_shape, query_shape[2], chunk)

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        options: StudentOptions,
        layout: TokenLayout | None,
    ) -> float:
        batch, heads, tokens, width = query_shape
        return 8.0 * batch * heads * tokens * width * options.features
