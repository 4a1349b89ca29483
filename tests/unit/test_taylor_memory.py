"""The memory estimates against what a call really holds.

The Triton paths allocate with torch alone and their kernels nothing, so that kernels which do
nothing leave the peak as it is: that is how shapes of real size are measured without a GPU.
`benchmarks/gpu_memory.py` measures on one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.held_bytes import HeldBytes

from attnscope.attention.sums_paths import Path
from attnscope.attention.taylor import (
    kernel,
    memory,
    triton_full,
    triton_project,
    triton_stream,
    triton_whole,
)
from attnscope.attention.taylor.attend import Options, taylor_attention
from attnscope.attention.taylor.memory import Shape, working_bytes
from attnscope.attention.taylor.paths import TritonSums
from attnscope.attention.taylor.triton_stream import StreamConfig

CPU = torch.device("cpu")


CASES = {
    "cross": (Shape(1, 4, 700, 900, 32, 32), torch.float32, 3, Options()),
    "whole_head": (Shape(1, 2, 1000, 1000, 128, 128), torch.bfloat16, 3, Options()),
    "independent": (
        Shape(1, 2, 3000, 3000, 128, 128),
        torch.float32,
        3,
        Options(sub_head_blocks=4, sub_head_mode="independent"),
    ),
    "projected": (
        Shape(1, 2, 3000, 3000, 64, 64),
        torch.float32,
        3,
        Options(feature_projection=8),
    ),
    "shared": (
        Shape(2, 3, 500, 700, 64, 48),
        torch.float64,
        4,
        Options(sub_head_blocks=4, block_q=100, block_k=200),
    ),
    "many_features": (Shape(1, 1, 200, 300, 24, 16), torch.float16, 6, Options()),
    "few_queries": (
        Shape(1, 1, 16, 5000, 24, 16),
        torch.float32,
        4,
        Options(centre_queries=False),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_near_what_is_held(case: str) -> None:
    shape, dtype, terms, options = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, width: int) -> torch.Tensor:
        size = shape.batch, shape.heads, tokens, width
        return torch.randn(size, generator=generator).to(dtype)

    query = draw(shape.queries, shape.head_dim)
    key, value = draw(shape.keys, shape.head_dim), draw(shape.keys, shape.value_dim)
    # What is kept from call to call is no call's working memory.
    taylor_attention(query, key, value, 0.1, terms, options=options)
    with HeldBytes() as held:
        taylor_attention(query, key, value, 0.1, terms, options=options)
    estimate = working_bytes("torch", shape, dtype, terms, options, CPU)
    assert held.peak == pytest.approx(estimate, rel=0.15)


class NoKernel:
    """A Triton kernel that is launched and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return lambda *args, **options: None


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and splits of a large GPU, kernels that do nothing."""
    names = ("build_kernel", "reduce_kernel", "read_kernel")
    chunked = ("build_chunk_kernel", "read_chunk_kernel")
    preparing = ("lay_kernel", "moment_kernel", "moment_sum_kernel", "factors_kernel")
    module = SimpleNamespace(
        tl=SimpleNamespace(float32=0, bfloat16=1),
        **{name: NoKernel() for name in (*names, *chunked, *preparing)},
    )
    monkeypatch.setattr(kernel, "CPU_BUDGET", kernel.DEVICE_BUDGET)
    monkeypatch.setattr(memory, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_full, "multiprocessors", lambda device: 132)
    for where in (triton_full, triton_project, triton_stream, triton_whole):
        monkeypatch.setattr(where, "kernels", lambda name: module)


BF16 = torch.bfloat16
INDEPENDENT = Options(sub_head_blocks=4, sub_head_mode="independent")
SHARED = Options(sub_head_blocks=4)
TRITON_CASES: dict[str, tuple[Path, Shape, torch.dtype, int, Options, StreamConfig]] = {
    "full_p3": ("full", Shape(1, 4, 4608, 4608, 128, 128), BF16, 3, INDEPENDENT, StreamConfig()),
    "full_p4_fp32": (
        "full", Shape(1, 2, 2048, 2048, 128, 128), torch.float32, 4, INDEPENDENT, StreamConfig()
    ),
    "full_whole_head": (
        "full", Shape(1, 4, 4608, 4608, 128, 128), BF16, 3, Options(), StreamConfig()
    ),
    "full_shared": ("full", Shape(1, 2, 4608, 4608, 128, 128), BF16, 3, SHARED, StreamConfig()),
    "full_few_queries": (
        "full", Shape(2, 2, 16, 2048, 64, 64), torch.float16, 3,
        Options(centre_queries=False), StreamConfig(),
    ),
    "full_p1": ("full", Shape(1, 2, 1024, 2048, 64, 64), BF16, 1, Options(), StreamConfig()),
    "full_projected": (
        "full", Shape(1, 2, 3000, 3000, 128, 128), BF16, 3,
        Options(feature_projection=56), StreamConfig(),
    ),
    "streaming": (
        "streaming", Shape(1, 4, 2048, 2048, 128, 128), BF16, 3, Options(), StreamConfig()
    ),
    "streaming_small_chunks": (
        "streaming", Shape(1, 2, 2048, 2048, 128, 128), BF16, 3, Options(),
        StreamConfig(feature_chunk=512, value_chunk=32, store_bf16=True),
    ),
    "streaming_p5": (
        "streaming", Shape(1, 2, 1024, 1024, 64, 64), BF16, 5, INDEPENDENT, StreamConfig()
    ),
    "streaming_large_chunks": (
        "streaming", Shape(1, 2, 512, 512, 128, 128), torch.float32, 4, Options(),
        StreamConfig(feature_chunk=65_536),
    ),
    "streaming_shared": (
        "streaming", Shape(1, 2, 4096, 1024, 128, 128), torch.float32, 3, SHARED, StreamConfig()
    ),
}  # fmt: skip


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("case", TRITON_CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_estimates_of_the_triton_paths_are_near_what_is_held(
    case: str, weighted: bool
) -> None:
    path, shape, dtype, terms, options, stream = TRITON_CASES[case]
    query = torch.ones(shape.batch, shape.heads, shape.queries, shape.head_dim, dtype=dtype)
    key = torch.ones(shape.batch, shape.heads, shape.keys, shape.head_dim, dtype=dtype)
    value = torch.ones(shape.batch, shape.heads, shape.keys, shape.value_dim, dtype=dtype)
    sums = TritonSums(path, dtype, stream)
    weights = torch.ones(1, 1, shape.keys) if weighted else None

    def attend() -> None:
        taylor_attention(
            query, key, value, 0.1, terms, weights=weights, options=options, sums=sums
        )

    # Tables that are kept from call to call are no call's working memory.
    attend()
    with HeldBytes() as held:
        attend()
    estimate = working_bytes(
        path, shape, dtype, terms, options, CPU, stream=stream, weighted=weighted
    )
    assert held.peak == pytest.approx(estimate, rel=0.15)


@pytest.mark.usefixtures("pretended_gpu")
def test_chunks_bound_the_memory_of_the_streaming_path() -> None:
    shape = Shape(1, 24, 4608, 4608, 128, 128)
    needs = [
        working_bytes(
            "streaming", shape, BF16, terms, Options(), CPU,
            stream=StreamConfig(feature_chunk=size),
        )
        for terms, size in ((3, 1024), (5, 1024), (5, 8192))
    ]  # fmt: skip
    assert needs[0] == pytest.approx(needs[1], rel=0.001)
    assert needs[2] - needs[1] >= 24 * 7168 * 128 * 4


def test_memory_does_not_grow_with_the_number_of_features() -> None:
    shape = Shape(1, 1, 4352, 4352, 56, 128)
    estimate = working_bytes("torch", shape, torch.float32, 6, Options(), CPU)
    bounds = kernel.CPU_BUDGET
    copies = 4 * 4352 * (56 * 2 + 128 * 4 + 4)
    assert estimate < bounds.sums + 4 * bounds.block + 2 * copies


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path: 'warp' is not allowed; allowed: torch, streaming"):
        working_bytes("warp", Shape(1, 1, 1, 1, 1, 1), torch.float32, 3, Options(), CPU)
