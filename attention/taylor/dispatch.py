"""Which implementation of Taylor attention runs: torch, streaming Triton or fully fused Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..sums_paths import Path, SumsPath
from . import triton_plan, triton_stream

PathSetting = Literal["auto", "torch", "streaming", "full"]

MIN_TOKENS = 256
"""Fewer keys than this run in torch under ``auto``: the kernels' launches would cost more."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The path to take.

    Attributes:
        code: the path, and what kind of reason kept the call from a better one.
        reason: why not what was asked for, or why ``auto`` took a lesser path; empty where it
            is what was asked for, or the best there is.
    """

    code: SumsPath
    reason: str = ""

    @property
    def path(self) -> Path:
        """What runs."""
        return self.code.path


def _refused_by_full(head_dim: int, value_dim: int, terms: int) -> tuple[str, SumsPath]:
    """Why the fully fused path can't take these shapes, with its code; empty where it can."""
    reason = triton_plan.refusal(head_dim, value_dim, terms)
    if not reason:
        return "", SumsPath.FULL
    if terms > triton_plan.MAX_TERMS:
        return reason, SumsPath.STREAMING_TERMS
    too_wide = value_dim > triton_plan.MAX_VALUE_DIM
    fits = head_dim <= triton_plan.MAX_HEAD_DIM[terms]
    return reason, (
        SumsPath.STREAMING_VALUE_DIM if too_wide and fits else SumsPath.STREAMING_HEAD_DIM
    )


def choose(
    setting: PathSetting,
    *,
    triton_reason: str,
    triton_installed: bool = True,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    terms: int,
    keys: int,
) -> Choice:
    """Choose the path for one call.

    Args:
        setting: what is asked for.
        triton_reason: why Triton can't run on the call's device, from
            `triton_support.unavailable`; empty where it can.
        triton_installed: whether that is for want of a device only.
        dtype: dtype of query, key and value.
        head_dim: d of one (sub-)head.
        value_dim: Dv of one (sub-)head.
        terms: P.
        keys: Nk.

    Returns:
        The path, with a reason where it is not the one asked for.

    Raises:
        ValueError: the setting is unknown.
    """
    if setting not in ("auto", "torch", "streaming", "full"):
        raise ValueError(
            f"taylor_path: unknown value {setting!r}; allowed: auto, torch, streaming, full"
        )
    if setting == "torch":
        return Choice(SumsPath.TORCH)
    missing = SumsPath.TORCH_NO_CUDA if triton_installed else SumsPath.TORCH_NO_TRITON
    if not triton_reason and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        triton_reason = f"Triton kernels take float32, float16 and bfloat16, not {dtype}"
        missing = SumsPath.TORCH_DTYPE
    if triton_reason:
        return Choice(missing, triton_reason)
    full, why = _refused_by_full(head_dim, value_dim, terms)
    streaming = triton_stream.refusal(terms)
    if setting == "auto" and keys < MIN_TOKENS:
        return Choice(SumsPath.TORCH_FEW_KEYS, f"{keys} keys are fewer than {MIN_TOKENS}")
    if streaming and (setting == "streaming" or full):
        return Choice(SumsPath.TORCH_TERMS, streaming)
    if setting == "streaming":
        return Choice(SumsPath.STREAMING)
    if full:
        # A forced path that can't run gives way to the next best, not to the slowest.
        return Choice(why, full)
    return Choice(SumsPath.FULL)
