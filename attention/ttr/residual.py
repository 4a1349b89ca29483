"""The residual student: exact near a query and to the text, learnt features for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..reasons import Fallback
from ..tiled.options import window_tiles
from ..tiled.tiles import SLOTS
from ..token_layout import TokenLayout
from . import residual_memory
from .features import FLOOR, Features, first_maps
from .places import has_far, near_keys
from .residual_serving import serve
from .student import Prediction, Rows, Served, Student, StudentOptions

_Work = Callable[..., tuple[torch.Tensor, ...]]

_FIRST_SPREAD = 0.3
"""Of the first features' exponents for queries and keys of unit variance, before `start`."""


class ResidualStudent(Student):
    """Exact text and window of tiles, `features` for the other tiles, one normaliser for both.

    Text queries are exact. The chunk bounds the queries that an update holds at once; serving
    takes what it needs by its own bounds.
    """

    kind: ClassVar[str] = "residual"

    def __init__(self, options: StudentOptions, generator: torch.Generator) -> None:
        super().__init__(options, generator)
        heads, width = options.heads, options.head_dim
        half = options.features // 2
        self._generator = generator

        def maps() -> nn.Parameter:
            drawn = torch.randn(heads, half, width, generator=generator)
            return nn.Parameter(drawn * (_FIRST_SPREAD / math.sqrt(width)))

        self.query_map, self.key_map = maps(), maps()
        self.bias = nn.Parameter(torch.zeros(heads, half))
        self.centre = nn.Parameter(torch.zeros(heads, width))
        self.damping = nn.Parameter(torch.ones(heads, 2))
        self.log_share = nn.Parameter(torch.full((heads,), -math.log(2 * half)))

    def share_parameters(self) -> list[nn.Parameter]:
        return [self.log_share]

    def refuses(
        self, query_shape: Sequence[int], key_shape: Sequence[int], layout: TokenLayout | None
    ) -> tuple[Fallback, str] | None:
        return refuses_layout(query_shape, key_shape, layout)

    @torch.no_grad()
    def start(self, rows: Rows) -> None:
        """Random features in the directions in which this call's queries and keys meet."""
        assert rows.layout is not None
        text, root = rows.layout.text_tokens, math.sqrt(rows.scale)
        query = rows.query[:, :, rows.index >= text].float().transpose(0, 1).flatten(1, 2) * root
        if query.shape[1] == 0:
            return
        key = rows.key[:, :, text:].float() * root
        key = (key - key.mean(dim=2, keepdim=True)).transpose(0, 1).flatten(1, 2)
        centre = query.mean(dim=1, keepdim=True)
        drawn = first_maps(query - centre, key, self.options.features, self._generator)
        self.centre.copy_(centre.squeeze(1))
        self.query_map.copy_(drawn[0])
        self.key_map.copy_(drawn[1])

    def predict(self, rows: Rows, chunk: int) -> Prediction:
        near_out, near_log_mass, far_out, far_log_mass = self._over(rows, chunk, _attend)
        log_mass = torch.logaddexp(near_log_mass, far_log_mass)
        near = near_out * (near_log_mass - log_mass).exp().unsqueeze(-1)
        far = far_out * (far_log_mass - log_mass).exp().unsqueeze(-1)
        return Prediction(
            out=near + far,
            log_mass=log_mass,
            far_out=far_out,
            far_log_mass=far_log_mass,
            near_out=near_out,
            near_log_mass=near_log_mass,
        )

    @torch.no_grad()
    def weights(self, rows: Rows) -> torch.Tensor:
        (weights,) = self._over(rows, len(rows.index), _weigh)
        return weights

    def _over(self, rows: Rows, chunk: int, work: _Work) -> tuple[torch.Tensor, ...]:
        """``work`` on each row of the batch, some heads and a chunk of queries; the parts joined.

        What the backward pass needs of a part is computed anew where there are several: kept, it
        would grow with the number of queries.
        """
        assert rows.layout is not None
        text = rows.layout.text_tokens
        near = near_keys(rows.index, rows.layout, self.options.window_radius)
        root = math.sqrt(rows.scale)
        batch, heads, queries, _ = rows.query.shape
        step = residual_memory.training_heads(self.options, rows.key.shape[2], chunk)
        again = torch.is_grad_enabled() and (batch > 1 or step < heads or chunk < queries)
        of_batch = []
        for row in range(batch):
            of_heads = []
            for some in _slices(heads, step):
                features = self._features().of(some)
                query, key = rows.query[row, some] * root, rows.key[row, some] * root
                value = rows.value[row, some]
                parts = []
                for part in _slices(queries, chunk):
                    arguments = (features, query[:, part], key, value, near[part], text)
                    if again:
                        parts.append(checkpoint(work, *arguments, use_reentrant=False))
                    else:
                        parts.append(work(*arguments))
                of_heads.append([torch.cat(same, dim=1) for same in zip(*parts, strict=True)])
            of_batch.append([torch.cat(same, dim=0) for same in zip(*of_heads, strict=True)])
        return tuple(torch.stack(same) for same in zip(*of_batch, strict=True))

    def _features(self) -> Features:
        return Features(
            self.query_map,
            self.key_map,
            self.bias,
            self.centre,
            self.damping,
            self.log_share,
        )

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
        radius = self.options.window_radius
        return serve(self._features(), query, key, value, scale, layout, radius, log_mass_rows)

    def training_bytes(self, query_shape: Sequence[int], queries: int, chunk: int) -> int:
        return residual_memory.training_bytes(self.options, query_shape, queries, chunk)

    def serving_bytes(
        self,
        query_shape: Sequence[int],
        dtype: torch.dtype,
        layout: TokenLayout | None,
        chunk: int,
    ) -> int:
        assert layout is not None
        device = self.bias.device
        return residual_memory.serving_bytes(self.options, query_shape, dtype, layout, device)

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        options: StudentOptions,
        layout: TokenLayout | None,
    ) -> float:
        """Products with exact keys, of the features, and of the features' sums."""
        if layout is None:
            raise ValueError("layout: is None; allowed: a layout, which the cost depends on")
        batch, heads, tokens, width = query_shape
        text, pairs = layout.text_tokens, float(layout.text_tokens * tokens)
        for grid in layout.grids:
            exact = text + window_tiles(grid, options.window_radius) * SLOTS
            pairs += grid[0] * grid[1] * exact
        if has_far(layout, options.window_radius):
            # Features and their sums: of a key, as of a query, F/2 rows of W and F of products,
            # and a query's F pseudo-keys beside the F/2 rows of its damping.
            pairs += layout.image_tokens * 2.0 * options.features
            pairs += layout.image_tokens * 0.5 * options.features
        return batch * heads * 4.0 * pairs * width


def refuses_layout(
    query_shape: Sequence[int], key_shape: Sequence[int], layout: TokenLayout | None
) -> tuple[Fallback, str] | None:
    """Why a student that needs to know where tokens stand can't take a call; None if it can."""
    if layout is None:
        return Fallback.LAYOUT, "the model does not say where its tokens stand in the picture"
    if layout.tokens != query_shape[2] or layout.tokens != key_shape[2]:
        detail = (
            f"the layout has {layout.tokens} tokens, the query {query_shape[2]}, "
            f"the key {key_shape[2]}"
        )
        return Fallback.LAYOUT, detail
    if not layout.grids:
        return Fallback.LAYOUT, "there are no image tokens"
    return None


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def _attend(
    features: Features,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    near: torch.Tensor,
    text: int,
) -> tuple[torch.Tensor, ...]:
    """Near output and log mass, far output and log mass: ``[G, s, D]`` and ``[G, s]``."""
    with torch.no_grad():
        logits = torch.matmul(query, key.transpose(-2, -1)).masked_fill_(~near, -math.inf)
        near_log_mass = logits.logsumexp(dim=-1)
        near_out = torch.matmul(logits.sub_(near_log_mass.unsqueeze(-1)).exp_(), value)
    kernel, shift = _kernel(features, query, key, near, text)
    mass = kernel.sum(dim=-1)
    least = mass.clamp_min(FLOOR)
    far_log_mass = (least.log() + shift).masked_fill(near.all(dim=-1), -math.inf)
    return near_out, near_log_mass, torch.matmul(kernel, value) / least.unsqueeze(-1), far_log_mass


def _weigh(
    features: Features,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    near: torch.Tensor,
    text: int,
) -> tuple[torch.Tensor, ...]:
    """Weights ``[G, s, N]``."""
    logits = torch.matmul(query, key.transpose(-2, -1)).masked_fill_(~near, -math.inf)
    kernel, shift = _kernel(features, query, key, near, text)
    logits = torch.where(near, logits, kernel.log() + shift.unsqueeze(-1))
    return (torch.softmax(logits, dim=-1),)


def _kernel(
    features: Features, query: torch.Tensor, key: torch.Tensor, near: torch.Tensor, text: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the features make of e^{q·k}, over ``e^shift``: ``[G, s, N]`` and shift ``[G, s]``.

    Near keys get 0. The shifts, a feature's largest key and a query's largest feature, keep
    exponentials in range and change nothing: no gradient goes through them.
    """
    mean = key[:, text:].mean(dim=1, keepdim=True)
    of_keys = features.of_keys(key - mean)
    most = of_keys[:, text:].detach().amax(dim=1, keepdim=True)
    of_queries = features.of_queries(query, mean) + most
    shift = of_queries.detach().amax(dim=-1, keepdim=True)
    # The text, which is always near, may stand out of the image keys' range.
    right = (of_keys - most).clamp_max(0.0).exp()
    kernel = torch.matmul((of_queries - shift).exp(), right.transpose(-2, -1))
    return kernel.masked_fill(near, 0.0), shift.squeeze(-1)
