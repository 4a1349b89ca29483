"""The founding student: sums of features and values over the order of the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from ..reasons import Fallback
from ..taylor.kernel import accumulation_dtype
from ..token_layout import TokenLayout
from .student import Prediction, Rows, Served, Student, StudentOptions


class ScanStudent(Student):
    """The mean of a scan from the first token on and one from the last token on.

    With φ a linear map, SiLU and a linear map, shared by queries, keys and heads,

    ``forwardᵢ = φ(qᵢ)·Σ_{j ≤ i} φ(kⱼ)·vⱼᵀ / (i + 1)``, backward likewise over j ≥ i, and
    ``out = (forward + backward) / 2``.

    There is no normaliser but the number of tokens, φ may be negative, and the result depends on
    the tokens' order. Training starts at the running mean of the values.

    The chunk of serving is the number of tokens whose sums ``[F, D]`` are held at once; that of
    training the number of queries, each with the weights of all keys.
    """

    kind: ClassVar[str] = "scan"

    def __init__(self, options: StudentOptions, generator: torch.Generator) -> None:
        super().__init__(options, generator)
        width, features = options.head_dim, options.features

        def drawn(rows: int, columns: int, spread: float) -> nn.Parameter:
            values = torch.randn(rows, columns, generator=generator)
            return nn.Parameter(values * (spread / math.sqrt(columns)))

        self.first = drawn(features, width, 1.0)
        self.first_bias = nn.Parameter(torch.zeros(features))
        # Small beside the bias, by which φ(q)·φ(k) is 1.
        self.second = drawn(features, features, _FIRST_SPREAD / math.sqrt(features))
        self.second_bias = nn.Parameter(torch.full((features,), features**-0.5))

    def refuses(
        self, query_shape: Sequence[int], key_shape: Sequence[int], layout: TokenLayout | None
    ) -> tuple[Fallback, str] | None:
        if query_shape[2] != key_shape[2]:
            detail = f"a scan needs as many keys as queries: {key_shape[2]} and {query_shape[2]}"
            return Fallback.LAYOUT, detail
        return None

    def predict(self, rows: Rows, chunk: int) -> Prediction:
        root = math.sqrt(rows.scale)
        of_keys = self._features(rows.key * root)
        queries = len(rows.index)
        parts = []
        for first in range(0, queries, chunk):
            some = slice(first, first + chunk)
            query = self._features(rows.query[:, :, some] * root)
            arguments = (query, of_keys, rows.value, rows.index[some])
            if torch.is_grad_enabled() and chunk < queries:
                parts.append(checkpoint(_attend, *arguments, use_reentrant=False))
            else:
                parts.append(_attend(*arguments))
        return Prediction(torch.cat(parts, dim=2))

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
        wide, root = accumulation_dtype(query.dtype), math.sqrt(scale)
        # A GPU has products of its short types for less; sums from chunk to chunk are wide.
        dtype = query.dtype if query.device.type == "cuda" else wide
        batch, heads, tokens = query.shape[:3]
        out = query.new_empty(value.shape, dtype=wide)
        shape = (batch, heads, self.options.features, value.shape[-1])
        for backward in (False, True):
            held = torch.zeros(shape, dtype=wide, device=query.device)
            starts = range(0, tokens, chunk)
            for first in reversed(starts) if backward else starts:
                some = slice(first, min(first + chunk, tokens))
                of_keys = self._features(key[:, :, some].to(dtype) * root)
                of_queries = self._features(query[:, :, some].to(dtype) * root)
                own = value[:, :, some].to(dtype)
                if backward:
                    of_keys, of_queries, own = (x.flip(2) for x in (of_keys, of_queries, own))
                sums = (of_keys.unsqueeze(-1) * own.unsqueeze(-2)).cumsum_(dim=2)
                scanned = torch.matmul(of_queries.unsqueeze(-2), sums).squeeze(-2).to(wide)
                scanned += torch.matmul(of_queries.to(wide), held)
                held += sums[:, :, -1]
                del sums
                counts = _counts(some, tokens, backward, wide, query.device)
                if backward:
                    out[:, :, some] += scanned.flip(2) * counts
                else:
                    out[:, :, some] = scanned * counts
        return Served(out.to(query.dtype))

    def training_bytes(self, query_shape: Sequence[int], queries: int, chunk: int) -> int:
        batch, heads, tokens, width = query_shape
        features, chunk = self.options.features, min(chunk, queries)
        # Of the keys: scaled, φ's layers and their gradients. Of the pairs: products, weights by
        # place, and their gradients.
        of_keys = tokens * (width + 4.5 * features)
        pairs = chunk * tokens * 3.5
        return int(4 * batch * heads * (of_keys + pairs + queries * 4 * width))

    def serving_bytes(
        self,
        query_shape: Sequence[int],
        dtype: torch.dtype,
        layout: TokenLayout | None,
        chunk: int,
    ) -> int:
        batch, heads, tokens, width = query_shape
        features, chunk = self.options.features, min(chunk, tokens)
        wide: int = accumulation_dtype(dtype).itemsize
        on_gpu = self.first.device.type == "cuda"
        size: int = dtype.itemsize if on_gpu else wide
        # The running sums of a chunk, what they are made of, and those from chunk to chunk.
        of_chunk = size * chunk * (features * width + 4 * features + 4 * width)
        held = wide * 2 * features * width
        short = 0 if dtype.itemsize == wide else dtype.itemsize * tokens * width
        return batch * heads * (wide * tokens * width + max(short, of_chunk + held))

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        options: StudentOptions,
        layout: TokenLayout | None,
    ) -> float:
        """Of φ twice, and of each direction's sums: built, added up and read."""
        batch, heads, tokens, width = query_shape
        features = options.features
        phi = 4.0 * features * (width + features)
        return batch * heads * tokens * (phi + 2.0 * 4.0 * features * width)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """φ: ``[…, F]`` of ``[…, D]``, in x's dtype."""
        dtype = x.dtype
        hidden = silu(linear(x, self.first.to(dtype), self.first_bias.to(dtype)))
        return linear(hidden, self.second.to(dtype), self.second_bias.to(dtype))


_FIRST_SPREAD = 0.5


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Both scans at some places, by the weights of all keys: ``[B, H, s, D]``."""
    tokens = key.shape[2]
    place = torch.arange(tokens, device=index.device)
    own = index.unsqueeze(-1)
    before = (place <= own) / (own + 1).to(value.dtype)
    after = (place >= own) / (tokens - own).to(value.dtype)
    weights = torch.matmul(query, key.transpose(-2, -1)) * ((before + after) * 0.5)
    return torch.matmul(weights, value)


def _counts(
    some: slice, tokens: int, backward: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Half of one over the number of tokens that each place's scan has seen, ``[chunk, 1]``."""
    place = torch.arange(some.start, some.stop, device=device, dtype=dtype).unsqueeze(-1)
    seen = tokens - place if backward else place + 1
    return 0.5 / seen
