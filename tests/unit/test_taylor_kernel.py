"""The blocked sums against the truncated series on the full matrix, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.attention.taylor import kernel
from attnscope.attention.taylor.kernel import sums


def series(logits: torch.Tensor, terms: int, first: int = 0) -> torch.Tensor:
    return sum(
        (logits**degree / math.factorial(degree) for degree in range(first, terms)),
        torch.zeros_like(logits),
    )


def tensors(
    queries: int, keys: int, width: int, values: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def draw(tokens: int, size: int) -> torch.Tensor:
        x = torch.randn(2, 3, tokens, size, generator=generator, dtype=torch.float64)
        return (x / size**0.25 if size else x).to(dtype)

    return draw(queries, width), draw(keys, width), draw(keys, values)


def assert_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: int, **how: int) -> None:
    weights = series(q @ k.mT, terms)
    numerator, denominator = sums(q, k, v, terms, **how)
    torch.testing.assert_close(numerator, weights @ v)
    torch.testing.assert_close(denominator, weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("terms", range(1, 9))
def test_equals_the_truncated_series(terms: int) -> None:
    assert_sums(*tensors(23, 37, 4, 5), terms, block_q=10, block_k=7)


@pytest.mark.parametrize(
    ("width", "values", "terms"),
    [(32, 32, 4), (128, 128, 3), (24, 8, 4), (9, 4, 6), (7, 2, 8), (56, 16, 3), (1, 1, 4)],
)
def test_equals_the_truncated_series_for_every_kind_of_chunk(
    width: int, values: int, terms: int
) -> None:
    assert_sums(*tensors(9, 11, width, values), terms)


@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    width=st.integers(1, 9),
    values=st.integers(0, 9),
    terms=st.integers(1, 5),
    block_q=st.integers(0, 50),
    block_k=st.integers(0, 50),
)
@settings(deadline=None, max_examples=40)
def test_equals_the_truncated_series_for_any_shape_and_blocks(
    queries: int, keys: int, width: int, values: int, terms: int, block_q: int, block_k: int
) -> None:
    tensor = tensors(queries, keys, width, values)
    assert_sums(*tensor, terms, block_q=block_q, block_k=block_k)


def test_tight_budgets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = kernel.Budget(block=1, sums=1, heads=1)
    monkeypatch.setattr(kernel, "budget", lambda device: tight)
    assert_sums(*tensors(150, 170, 6, 3), 5)


def test_without_the_constant_degree_0_is_left_out() -> None:
    q, k, v = tensors(9, 12, 6, 4)
    weights = series(q @ k.mT, 4, first=1)
    numerator, denominator = sums(q, k, v, 4, constant=False)
    torch.testing.assert_close(numerator, weights @ v)
    torch.testing.assert_close(denominator, weights.sum(-1, keepdim=True))


def test_layout_in_memory_does_not_matter() -> None:
    q, k, v = tensors(9, 12, 6, 4)
    for layout in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
        back = [layout.index(axis) for axis in range(4)]
        moved = [x.permute(layout).contiguous().permute(back) for x in (q, k, v)]
        torch.testing.assert_close(sums(*moved, 4), sums(q, k, v, 4))


@pytest.mark.parametrize("per_head", [False, True])
def test_key_weights_multiply_terms(per_head: bool) -> None:
    q, k, v = tensors(5, 11, 3, 2)
    shape = (2, 3, 11) if per_head else (1, 1, 11)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(3)).double()
    weights[..., 4] = 0.0
    full = series(q @ k.mT, 4) * weights[:, :, None, :]
    expected = full @ v, full.sum(-1, keepdim=True)
    torch.testing.assert_close(sums(q, k, v, 4, weights=weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_input_is_summed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = tensors(40, 8192, 4, 5, dtype=dtype)
    numerator, denominator = sums(q, k, v, 3)
    assert numerator.dtype == denominator.dtype == torch.float32
    weights = series(q.double() @ k.double().mT, 3)
    torch.testing.assert_close(
        denominator.double(), weights.sum(-1, keepdim=True), rtol=1e-4, atol=1e-2
    )
    torch.testing.assert_close(
        (numerator / denominator).double(),
        weights @ v.double() / weights.sum(-1, keepdim=True),
        rtol=1e-3,
        atol=1e-4,
    )


@given(factor=st.floats(0.1, 30.0), terms=st.sampled_from([1, 3, 5, 7]))
@settings(deadline=None, max_examples=25)
def test_even_degree_keeps_denominators_positive(factor: float, terms: int) -> None:
    q, k, v = tensors(50, 8, 8, 0)
    assert sums(q * factor, k, v, terms)[1].min() > 0


def test_odd_degree_does_not() -> None:
    q, k, v = tensors(200, 8, 8, 0)
    assert sums(q * 3, k, v, 4)[1].min() < 0


@pytest.mark.parametrize("terms", [0, 9])
def test_terms_out_of_range_are_refused(terms: int) -> None:
    with pytest.raises(ValueError, match=f"terms: {terms} is not allowed; allowed: 1 to 8"):
        sums(*tensors(2, 2, 2, 2), terms)
