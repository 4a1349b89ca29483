"""The memory estimate against what a call really holds."""

from __future__ import annotations

import pytest
import torch
from support.held_bytes import HeldBytes

from attnscope.attention.taylor import kernel
from attnscope.attention.taylor.attend import Options, taylor_attention
from attnscope.attention.taylor.memory import Shape, working_bytes

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


def test_memory_does_not_grow_with_the_number_of_features() -> None:
    shape = Shape(1, 1, 4352, 4352, 56, 128)
    estimate = working_bytes("torch", shape, torch.float32, 6, Options(), CPU)
    bounds = kernel.CPU_BUDGET
    copies = 4 * 4352 * (56 * 2 + 128 * 4 + 4)
    assert estimate < bounds.sums + 4 * bounds.block + 2 * copies


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path: 'warp' is not allowed; allowed: torch"):
        working_bytes("warp", Shape(1, 1, 1, 1, 1, 1), torch.float32, 3, Options(), CPU)
