"""Which implementation of tiled attention runs: plain torch or Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..sums_paths import TiledPath
from ..taylor.triton_support import triton_installed, unavailable
from ..token_layout import TokenLayout
from ..variant import Dense
from . import memory, triton_plan
from .attend import Attended, tiled_attention
from .options import Options
from .triton_attend import tiled_attention_triton

Path = Literal["torch", "triton"]
PathSetting = Literal["auto", "torch", "triton"]

MIN_TOKENS = 1024
"""Fewer tokens than this run in torch under ``auto``: the kernels' launches would cost more."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which the kernels run."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The path to take.

    Attributes:
        code: the path, and what kind of reason kept the call from a better one.
        reason: why not what was asked for, or why ``auto`` took torch; empty where it is what
            was asked for, or the best there is.
    """

    code: TiledPath
    reason: str = ""

    @property
    def path(self) -> Path:
        """What runs."""
        return "triton" if self.code is TiledPath.TRITON else "torch"


def choose(
    setting: PathSetting,
    *,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    tokens: int,
    scale: float,
) -> Choice:
    """Choose the path for one call, from shapes and device alone.

    Args:
        setting: what is asked for.
        device_type: of the tensors.
        capability: compute capability of a CUDA device; None for another.
        dtype: of query, key and value.
        head_dim: D.
        value_dim: Dv.
        tokens: N.
        scale: factor on q·k.

    Raises:
        ValueError: the setting is unknown.
    """
    if setting not in ("auto", "torch", "triton"):
        raise ValueError(f"tiled_path: unknown value {setting!r}; allowed: auto, torch, triton")
    if setting == "torch":
        return Choice(TiledPath.TORCH)
    missing = unavailable(device_type)
    if missing:
        installed = triton_installed()
        return Choice(TiledPath.TORCH_NO_CUDA if installed else TiledPath.TORCH_NO_TRITON, missing)
    refused = triton_plan.refusal(dtype, head_dim, value_dim, scale)
    if refused:
        return Choice(*refused)
    if capability is not None and capability < LEAST_CAPABILITY:
        # Older ones lack bf16 and the shared memory that the kernels take.
        words = f"compute capability {capability} is below {LEAST_CAPABILITY}"
        return Choice(TiledPath.TORCH_OLD_GPU, words)
    if setting == "auto" and dtype == torch.float32:
        # Three products of tf32 each spill registers; nobody has found them faster.
        words = "float32 runs in torch unless Triton is asked for"
        return Choice(TiledPath.TORCH_FLOAT32, words)
    if setting == "auto" and tokens < MIN_TOKENS:
        words = f"{tokens} tokens are fewer than {MIN_TOKENS}"
        return Choice(TiledPath.TORCH_FEW_TOKENS, words)
    return Choice(TiledPath.TRITON)


def choose_for(
    setting: PathSetting, query: torch.Tensor, value: torch.Tensor, scale: float
) -> Choice:
    """`choose` for a call's tensors, ``[B, H, N, D]`` and ``[B, H, N, Dv]``."""
    capability = None
    if query.device.type == "cuda" and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(query.device)
    return choose(
        setting,
        device_type=query.device.type,
        capability=capability,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        tokens=query.shape[2],
        scale=scale,
    )


def attend(
    choice: Choice,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    layout: TokenLayout,
    options: Options,
    *,
    log_mass_rows: torch.Tensor | None = None,
    dense: Dense | None = None,
) -> Attended:
    """`attend.tiled_attention` on the chosen path; arguments and errors are its."""
    run = tiled_attention_triton if choice.path == "triton" else tiled_attention
    return run(query, key, value, scale, layout, options, log_mass_rows=log_mass_rows, dense=dense)


def working_bytes(
    choice: Choice,
    query: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    options: Options,
) -> int:
    """Peak of what a call allocates on the chosen path, in bytes, its output included."""
    batch, heads, _, head_dim = query.shape
    value_dim, dtype = value.shape[3], query.dtype
    if choice.path == "triton":
        return triton_plan.memory_bytes(layout, batch * heads, head_dim, value_dim, dtype, options)
    return memory.working_bytes(
        batch, heads, head_dim, value_dim, dtype, layout, options, query.device
    )
