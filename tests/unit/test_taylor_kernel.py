"""The blocked kernel against the truncated series on the full matrix, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from attnscope.attention.exact import reference_attention
from attnscope.attention.quality import nmse
from attnscope.attention.taylor.kernel import taylor_attention


def series(logits: torch.Tensor, terms: int) -> torch.Tensor:
    return sum(
        (logits**degree / math.factorial(degree) for degree in range(terms)),
        torch.zeros_like(logits),
    )


def tensors(*shape_qk: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    queries, keys, head_dim = shape_qk
    generator = torch.Generator().manual_seed(1)

    def draw(tokens: int, width: int) -> torch.Tensor:
        return torch.randn(2, 3, tokens, width, generator=generator, dtype=torch.float64).to(dtype)

    return draw(queries, head_dim), draw(keys, head_dim), draw(keys, head_dim + 1)


@pytest.mark.parametrize("terms", range(1, 9))
def test_equals_the_truncated_series(terms: int) -> None:
    q, k, v = tensors(23, 37, 4)
    scale = 0.7
    weights = series(q @ k.transpose(-2, -1) * scale, terms)
    numerator, denominator = taylor_attention(q, k, v, scale, terms, block_q=10, block_k=7)
    torch.testing.assert_close(numerator, weights @ v)
    torch.testing.assert_close(denominator, weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("blocks", [(1, 1), (8, 5), (64, 64)])
def test_block_sizes_do_not_matter(blocks: tuple[int, int]) -> None:
    q, k, v = tensors(19, 33, 5)
    whole = taylor_attention(q, k, v, 0.5, 3, block_q=100, block_k=100)
    parts = taylor_attention(q, k, v, 0.5, 3, block_q=blocks[0], block_k=blocks[1])
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1])


def test_a_negative_scale_flips_the_logits() -> None:
    q, k, v = tensors(5, 6, 3)
    flipped = taylor_attention(-q, k, v, 0.5, 4)
    negative = taylor_attention(q, k, v, -0.5, 4)
    torch.testing.assert_close(negative[0], flipped[0])


def test_key_weights_multiply_terms_and_masked_keys_may_hold_nan() -> None:
    q, k, v = tensors(5, 6, 3)
    keep = torch.tensor([1.0, 1, 0, 1, 0, 2])[None, None, :].double()
    weights = series(q @ k.transpose(-2, -1) * 0.5, 3) * keep[:, :, None, :]
    expected = weights @ v
    k[:, :, 2] = float("nan")
    v[:, :, 4] = float("inf")
    numerator, denominator = taylor_attention(q, k, v, 0.5, 3, weights=keep)
    torch.testing.assert_close(numerator, expected)
    torch.testing.assert_close(denominator, weights.sum(-1, keepdim=True))


def test_constant_values_come_out_constant() -> None:
    q, k, v = tensors(9, 30, 4)
    v = torch.full_like(v, 2.5)
    numerator, denominator = taylor_attention(q, k, v, 0.5, 3)
    torch.testing.assert_close(numerator / denominator, torch.full_like(numerator, 2.5))


def test_error_falls_with_the_degree_and_beats_the_mean_of_values() -> None:
    q, k, v = tensors(64, 64, 16)
    scale = 16**-0.5
    exact = reference_attention(q, k, v, scale)
    errors = []
    for terms in (1, 3, 5, 7):
        numerator, denominator = taylor_attention(q, k, v, scale, terms)
        errors.append(float(nmse(numerator / denominator, exact)))
    mean_of_values = float(nmse(v.mean(2, keepdim=True).expand_as(exact), exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(mean_of_values, rel=1e-5)
    assert errors[-1] < 1e-3 < mean_of_values / 10


def test_even_degree_keeps_denominators_positive_where_odd_does_not() -> None:
    q, k, v = tensors(200, 8, 16)
    _, even = taylor_attention(q * 3, k, v, 16**-0.5, 3)
    _, odd = taylor_attention(q * 3, k, v, 16**-0.5, 4)
    assert even.min() > 0 > odd.min()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_input_is_summed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = tensors(40, 8192, 4, dtype=dtype)
    numerator, denominator = taylor_attention(q, k, v, 0.5, 3)
    assert numerator.dtype == denominator.dtype == torch.float32
    weights = series(q.double() @ k.double().transpose(-2, -1) * 0.5, 3)
    torch.testing.assert_close(
        denominator.double(), weights.sum(-1, keepdim=True), rtol=1e-4, atol=1e-2
    )
    torch.testing.assert_close(
        (numerator / denominator).double(),
        weights @ v.double() / weights.sum(-1, keepdim=True),
        rtol=1e-3,
        atol=1e-4,
    )
