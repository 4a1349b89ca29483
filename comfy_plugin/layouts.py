"""Reads ComfyUI's attention calls: arguments, tensor layouts and masks, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..attention import masks
from ..attention.reasons import Fallback

_POSITIONS = (
    "q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape"
)  # fmt: skip

OWN_ARGUMENTS = frozenset(_POSITIONS) - {"attn_precision"}
"""What a call with other tensors has of its own; other arguments it takes over."""

_KNOWN = frozenset(_POSITIONS) | {
    "scale",
    "transformer_options",
    # Hints about precision for the exact kernels; a variant chooses its own.
    "low_precision_attention",
    "enable_gqa",
    # wrap_attn's own mark against calling itself again.
    "_inside_attn_wrapper",
}


class Unreadable(Exception):
    """A call that only the exact path can serve."""

    def __init__(self, reason: Fallback, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


# Not frozen: that is slow to fill, and one is filled in every call.
@dataclass(slots=True)
class AttentionCall:
    """An attention call in one layout.

    Attributes:
        query: ``[B, H, Nq, D]``, a view of the caller's tensor.
        key: ``[B, H, Nk, D]``.
        value: ``[B, H, Nk, Dv]``.
        mask: broadcastable to ``[B, H, Nq, Nk]``, or None.
        scale: factor on q·k.
        keep_heads: whether the caller wants ``[B, H, Nq, Dv]`` back.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    keep_heads: bool

    def give_back(self, out: torch.Tensor) -> torch.Tensor:
        """Bring ``[B, H, Nq, Dv]`` into the layout that the caller expects.

        Raises:
            ValueError: the output's shape is not that of the call.
        """
        expected = (*self.query.shape[:3], self.value.shape[3])
        if tuple(out.shape) != expected:
            raise ValueError(f"output has shape {tuple(out.shape)}; expected {expected}")
        if self.keep_heads:
            return out
        batch, heads, tokens, width = expected
        return out.transpose(1, 2).reshape(batch, tokens, heads * width)

    def read_output(self, out: Any) -> torch.Tensor:
        """An attention function's output for this call, as ``[B, H, Nq, Dv]``.

        Not every override knows ``skip_output_reshape``, so both layouts are taken.

        Raises:
            ValueError: it has neither.
        """
        expected = (*self.query.shape[:3], self.value.shape[3])
        batch, heads, tokens, width = expected
        shape = tuple(getattr(out, "shape", ()))
        if shape == (batch, tokens, heads * width):
            split: torch.Tensor = out.unflatten(2, (heads, width)).transpose(1, 2)
            return split
        if shape == expected:
            whole: torch.Tensor = out
            return whole
        raise ValueError(
            f"output has shape {shape}; allowed: {(batch, tokens, heads * width)} or {expected}"
        )


def _heads_out(tensor: torch.Tensor, heads: int, split: bool) -> torch.Tensor:
    if split:
        if tensor.ndim != 4 or tensor.shape[1] != heads:
            raise Unreadable(Fallback.LAYOUT, f"{tuple(tensor.shape)} is not [B, {heads}, N, D]")
        return tensor
    if tensor.ndim != 3 or tensor.shape[2] % heads:
        raise Unreadable(Fallback.LAYOUT, f"{tuple(tensor.shape)} is not [B, N, {heads}·D]")
    batch, tokens, width = tensor.shape
    return tensor.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


def _mask(mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> torch.Tensor | None:
    if mask is None:
        return None
    batch, heads, queries, keys = shape
    if mask.ndim == 2 and mask.shape[0] == batch and mask.shape[0] not in (1, queries):
        # One row per picture: which keys are padding.
        mask = mask[:, None, :]
    try:
        mask = masks.expand_dims(mask, batch, heads)
    except ValueError as error:
        raise Unreadable(Fallback.MASK, str(error)) from None
    if mask.shape[2] not in (1, queries) or mask.shape[3] not in (1, keys):
        raise Unreadable(
            Fallback.MASK, f"mask {tuple(mask.shape)} does not fit {queries}×{keys} tokens"
        )
    return mask


def read_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> AttentionCall:
    """Read the arguments of a call of ComfyUI's ``optimized_attention``.

    Raises:
        Unreadable: with the reason for which the call has to run exactly.
    """
    if len(args) > len(_POSITIONS):
        raise Unreadable(Fallback.UNKNOWN_ARGUMENT, f"{len(args)} positional arguments")
    given = {**dict(zip(_POSITIONS, args, strict=False)), **kwargs}
    if not given.keys() <= _KNOWN:
        unknown = sorted(given.keys() - _KNOWN)
        raise Unreadable(Fallback.UNKNOWN_ARGUMENT, ", ".join(unknown))
    if given.get("enable_gqa"):
        raise Unreadable(Fallback.UNKNOWN_ARGUMENT, "enable_gqa")
    try:
        query, key, value, heads = (given[name] for name in _POSITIONS[:4])
    except KeyError as error:
        raise Unreadable(Fallback.LAYOUT, f"no argument {error}") from None
    split = bool(given.get("skip_reshape"))
    query = _heads_out(query, heads, split)
    key = _heads_out(key, heads, split)
    value = _heads_out(value, heads, split)
    batch, heads, queries, head_dim = query.shape
    key_shape = key.shape
    keys = key_shape[2]
    if key_shape != (batch, heads, keys, head_dim) or value.shape[:3] != key_shape[:3]:
        raise Unreadable(
            Fallback.LAYOUT,
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}",
        )
    scale = given.get("scale")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=_mask(given.get("mask"), (batch, heads, queries, keys)),
        scale=head_dim**-0.5 if scale is None else float(scale),
        keep_heads=bool(given.get("skip_output_reshape")),
    )
