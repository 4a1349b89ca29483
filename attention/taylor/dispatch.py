"""Which implementation of Taylor attention runs: torch, streaming Triton or fully fused Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from . import triton_plan, triton_stream

Path = Literal["torch", "streaming", "full"]
PathSetting = Literal["auto", "torch", "streaming", "full"]

MIN_TOKENS = 256
"""Fewer keys than this run in torch under ``auto``: the kernels' launches would cost more."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The path to take.

    Attributes:
        path: what runs.
        reason: why not what was asked for, or why ``auto`` took a lesser path; empty where it
            is what was asked for, or the best there is.
    """

    path: Path
    reason: str = ""


def choose(
    setting: PathSetting,
    *,
    triton_reason: str,
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
        return Choice("torch")
    if not triton_reason and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        triton_reason = f"Triton kernels take float32, float16 and bfloat16, not {dtype}"
    if triton_reason:
        return Choice("torch", triton_reason)
    full = triton_plan.refusal(head_dim, value_dim, terms)
    streaming = triton_stream.refusal(terms)
    if setting == "auto" and keys < MIN_TOKENS:
        return Choice("torch", f"{keys} keys are fewer than {MIN_TOKENS}")
    if setting == "full" or (setting == "auto" and not full):
        # A forced path that can't run gives way to the next best, not to the slowest.
        if not full:
            return Choice("full")
        return Choice("torch", streaming) if streaming else Choice("streaming", full)
    if streaming:
        return Choice("torch", streaming)
    if setting == "streaming":
        return Choice("streaming")
    return Choice("streaming", full)
