"""Whether Triton can run here, and access to its kernels without importing it too early."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache
from types import ModuleType

import torch


@lru_cache(maxsize=1)
def triton_installed() -> bool:
    """Whether the ``triton`` package is there."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on the CPU too."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def unavailable(device_type: str) -> str:
    """Why Triton kernels can't run on a device of this type; empty where they can."""
    if not triton_installed():
        return "triton is not installed"
    if device_type != "cuda" and not interpreted():
        return f"Triton kernels need a CUDA device, the tensors are on {device_type!r}"
    return ""


@lru_cache(maxsize=8)
def kernels(name: str) -> ModuleType:
    """A module of kernels of this package, by name.

    Raises:
        ImportError: triton is not installed or does not load.
    """
    return importlib.import_module(f".{name}", __package__)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """What matrix products take: fp32 for fp32, else bf16, whose range fits sums over keys.

    Raises:
        ValueError: another dtype than float32, float16, bfloat16.
    """
    if dtype == torch.float32:
        return dtype
    if dtype in (torch.float16, torch.bfloat16):
        return torch.bfloat16
    raise ValueError(f"dtype: {dtype} is not supported; allowed: float32, float16, bfloat16")


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have; those of an H100 in the interpreter."""
    if device.type != "cuda":
        return 227 * 1024
    return int(
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    )


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    """Check the shapes that both Triton paths share.

    Raises:
        ValueError: naming the argument, its shape or dtype, and what is allowed.
    """
    batch, heads, _, head_dim = query.shape
    if key.shape[:2] != (batch, heads) or key.shape[3] != head_dim:
        raise ValueError(
            f"key: shape {tuple(key.shape)} does not fit query {tuple(query.shape)}; "
            "allowed: [B, H, Nk, d] with query's B, H and d"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: shape {tuple(value.shape)} does not fit key {tuple(key.shape)}; "
            "allowed: [B, H, Nk, Dv] with key's B, H and Nk"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"dtype: query {query.dtype}, key {key.dtype} and value {value.dtype} differ"
        )
    operand_dtype(query.dtype)
    if weights is not None and (
        weights.ndim != 3
        or weights.shape[0] not in (1, batch)
        or weights.shape[1] not in (1, heads)
        or weights.shape[2] != key.shape[2]
    ):
        raise ValueError(
            f"weights: shape {tuple(weights.shape)} is not allowed; "
            f"allowed: [{batch} or 1, {heads} or 1, {key.shape[2]}]"
        )


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its last dimension contiguous, which the kernels assume; a copy only if not."""
    return x if x.stride(-1) == 1 else x.contiguous()
