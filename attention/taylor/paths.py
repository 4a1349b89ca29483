"""The implementations of the sums behind one signature, `blocks.Sums`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import kernel, triton_full, triton_stream, triton_whole
from .attend import Options
from .blocks import Sums
from .dispatch import Choice, PathSetting, choose
from .triton_stream import StreamConfig
from .triton_support import operand_dtype, triton_installed, unavailable


@dataclass(frozen=True, slots=True)
class TritonSums:
    """A Triton path as `blocks.Sums`.

    Attributes:
        path: ``"full"`` or ``"streaming"``.
        dtype: of the call's query: 16 bits are multiplied as bf16, float32 as it is.
        stream: chunks of the streaming path.
    """

    path: str
    dtype: torch.dtype
    stream: StreamConfig

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        terms: int,
        *,
        weights: torch.Tensor | None = None,
        constant: bool = True,
        block_q: int = 0,
        block_k: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `kernel.sums`; the kernels choose their own block sizes."""
        operand = operand_dtype(self.dtype)
        query, key, value = (x.to(operand).contiguous() for x in (query, key, value))
        if self.path == "full":
            sums = triton_full.sums(query, key, value, terms, weights=weights)
        else:
            sums = triton_stream.sums(
                query, key, value, terms, weights=weights, config=self.stream
            )
        numerator, denominator = sums
        if not constant:
            # Degree 0 is the sum of what is attended to, the same for every query.
            if weights is None:
                numerator -= value.sum(dim=2, keepdim=True, dtype=torch.float32)
                denominator -= float(key.shape[2])
            else:
                factor = weights.float()[..., None]
                numerator -= torch.matmul(factor.transpose(-2, -1), value.float())
                denominator -= factor.sum(dim=2, keepdim=True)
        return numerator, denominator

    def takes_whole(self, terms: int, options: Options) -> bool:
        """As `attend.WholeHeads`."""
        independent = options.sub_head_blocks == 1 or options.sub_head_mode == "independent"
        # Degree 0 alone needs no kernel, and a projection none of the passes that are saved.
        return self.path == "full" and terms > 1 and independent and not options.feature_projection

    def whole(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        terms: int,
        options: Options,
        eps: float,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """As `attend.WholeHeads`."""
        return triton_whole.attention(
            query,
            key,
            value,
            scale,
            terms,
            parts=options.heads_per_head,
            centre_queries=options.centre_queries,
            centre_keys=options.centre_keys,
            centre_values=options.centre_values,
            round_denominators=options.round_denominators,
            eps=eps,
            out=out,
        )

    def whole_bytes(self, queries: int, keys: int, head_dim: int, options: Options) -> int:
        """As `attend.WholeHeads`."""
        size = operand_dtype(self.dtype).itemsize
        return triton_whole.whole_bytes(queries, keys, head_dim, options.heads_per_head, size)


def pick(
    setting: PathSetting,
    stream: StreamConfig,
    options: Options,
    query: torch.Tensor,
    value: torch.Tensor,
    terms: int,
) -> tuple[Choice, Sums]:
    """The path of one call, from shapes and device alone.

    Args:
        setting: what is asked for.
        stream: chunks of the streaming path.
        options: of the expansion.
        query: ``[B, H, Nq, D]``.
        value: ``[B, H, Nk, Dv]``.
        terms: P.
    """
    choice = choose(
        setting,
        triton_reason=unavailable(query.device.type),
        triton_installed=triton_installed(),
        dtype=query.dtype,
        head_dim=options.feature_width(query.shape[-1]),
        value_dim=value.shape[-1] // options.heads_per_head,
        terms=terms,
        keys=value.shape[2],
    )
    if choice.path == "torch":
        return choice, kernel.sums
    return choice, TritonSums(choice.path, query.dtype, stream)
