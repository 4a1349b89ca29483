"""Centring, projection and sub-head blocks against their definitions, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.attention.exact import reference_attention
from attnscope.attention.quality import nmse
from attnscope.attention.taylor.attend import Attended, Options, taylor_attention
from attnscope.attention.taylor.projection import factors, second_moment

PLAIN = Options(centre_keys=False, centre_queries=False, centre_values=False)
EVERY_WAY = [
    PLAIN,
    Options(),
    Options(sub_head_blocks=2),
    Options(sub_head_blocks=4, sub_head_mode="independent"),
    Options(feature_projection=8),
]
TOLERANCE = 1e-3
"""NMSE that counts as equal to exact attention; the mean of the values must miss it."""


def tensors(
    queries: int = 40, keys: int = 60, width: int = 16, seed: int = 1
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int) -> torch.Tensor:
        return torch.randn(2, 3, tokens, width, generator=generator, dtype=torch.float64)

    # Means that differ by head, as those of a model do.
    return draw(queries) + draw(1), draw(keys) + draw(1), draw(keys)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: int, **how: Any) -> Attended:
    return taylor_attention(q, k, v, q.shape[-1] ** -0.5, terms, **how)


def series(logits: torch.Tensor, terms: int, first: int = 0) -> torch.Tensor:
    return sum(
        (logits**degree / math.factorial(degree) for degree in range(first, terms)),
        torch.zeros_like(logits),
    )


@pytest.mark.parametrize("options", [PLAIN, Options()])
def test_error_falls_with_the_degree_and_beats_the_mean_of_values(options: Options) -> None:
    q, k, v = tensors()
    q, k = (q - q.mean(2, keepdim=True)) * 0.7, k - k.mean(2, keepdim=True)
    exact = reference_attention(q, k, v, 0.25)
    errors = [float(nmse(attend(q, k, v, p, options=options).out, exact)) for p in (1, 3, 5, 7)]
    assert errors == sorted(errors, reverse=True)
    mean_of_values = float(nmse(v.mean(2, keepdim=True).expand_as(exact), exact))
    assert errors[-1] < TOLERANCE < mean_of_values / 10


def test_centring_on_both_sides_comes_closer() -> None:
    q, k, v = tensors()
    exact = reference_attention(q, k, v, 0.25)
    none, keys, both = (
        float(nmse(attend(q, k, v, 3, options=options).out, exact))
        for options in (PLAIN, Options(centre_queries=False), Options())
    )
    assert both < keys / 2 < none / 3


@given(size=st.floats(-20.0, 20.0), options=st.sampled_from(EVERY_WAY[1:]))
@settings(deadline=None, max_examples=20)
def test_a_vector_added_to_all_keys_changes_nothing(size: float, options: Options) -> None:
    q, k, v = tensors()
    shift = size * torch.linspace(-1, 1, 16).double()
    plain, moved = attend(q, k, v, 3, options=options), attend(q, k + shift, v, 3, options=options)
    torch.testing.assert_close(plain.out, moved.out, rtol=1e-6, atol=1e-6)


def test_without_centring_it_does() -> None:
    q, k, v = tensors()
    moved = attend(q, k + 1.0, v, 3, options=PLAIN).out
    assert float(nmse(moved, attend(q, k, v, 3, options=PLAIN).out)) > TOLERANCE


@given(
    queries=st.integers(1, 20),
    keys=st.integers(1, 20),
    terms=st.integers(1, 5),
    options=st.sampled_from(EVERY_WAY),
)
@settings(deadline=None, max_examples=40)
def test_constant_values_come_out_constant(
    queries: int, keys: int, terms: int, options: Options
) -> None:
    q, k, v = tensors(queries, keys)
    q = q * 0.1
    v[:] = torch.arange(16.0)
    out = attend(q, k, v, terms, options=options).out
    torch.testing.assert_close(out, v[:, :, :1].expand_as(out), rtol=1e-6, atol=1e-6)


@given(
    keep=st.lists(st.booleans(), min_size=1, max_size=30).filter(any),
    options=st.sampled_from(EVERY_WAY),
    per_head=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_masked_keys_have_no_influence_whatever_they_hold(
    keep: list[bool], options: Options, per_head: bool
) -> None:
    q, k, v = tensors(7, len(keep))
    live = torch.tensor(keep)
    expected = attend(q, k[:, :, live], v[:, :, live], 3, options=options)
    k[:, :, ~live], v[:, :, ~live] = float("nan"), float("inf")
    weights = live.double().expand(2, 3, -1) if per_head else live.double()[None, None]
    masked = attend(q, k, v, 3, options=options, weights=weights)
    torch.testing.assert_close(masked.out, expected.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(masked.denominator, expected.denominator, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [PLAIN, Options()])
def test_weights_multiply_what_softmax_sums(options: Options) -> None:
    q, k, v = tensors()
    q = q * 0.5
    weights = torch.rand(2, 3, 60, generator=torch.Generator().manual_seed(5)).double() * 3
    exact = reference_attention(q, k, v, 0.25, weights.log()[:, :, None, :])
    assert float(nmse(attend(q, k, v, 8, options=options, weights=weights).out, exact)) < TOLERANCE
    assert float(nmse(attend(q, k, v, 8, options=options).out, exact)) > TOLERANCE


def test_queries_far_out_overflow_nothing() -> None:
    q, k, v = (x.float() for x in tensors())
    attended = attend(q + 300.0, k, v, 3)
    assert bool(attended.out.isfinite().all()) and float(attended.denominator.min()) > 0


@pytest.mark.parametrize("options", EVERY_WAY)
def test_the_order_of_keys_does_not_matter(options: Options) -> None:
    q, k, v = tensors()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    plain = attend(q, k, v, 4, options=options).out
    mixed = attend(q, k[:, :, order], v[:, :, order], 4, options=options).out
    torch.testing.assert_close(plain, mixed, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("terms", [2, 3, 5])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_independent_blocks_are_attentions_of_their_own(terms: int, blocks: int) -> None:
    q, k, v = tensors()
    q = q * 0.2
    expected = []
    for part in torch.arange(16).chunk(blocks):
        weights = series(q[..., part] @ k[..., part].mT * (16 / blocks) ** -0.5, terms)
        expected.append(weights @ v[..., part] / weights.sum(-1, keepdim=True))
    options = Options(blocks, "independent", False, False, False)
    attended = attend(q, k, v, terms, options=options)
    torch.testing.assert_close(attended.out, torch.cat(expected, -1))
    assert attended.denominator.shape == (2, 3 * blocks, 40, 1)


@pytest.mark.parametrize("terms", [2, 3, 5])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_shared_blocks_are_one_attention_over_their_terms(terms: int, blocks: int) -> None:
    q, k, v = tensors()
    q = q * 0.2
    weights = torch.ones(2, 3, 40, 60, dtype=torch.float64)
    for part in torch.arange(16).chunk(blocks):
        weights += series(q[..., part] @ k[..., part].mT * 0.25, terms, first=1)
    options = Options(blocks, "shared", False, False, False)
    attended = attend(q, k, v, terms, options=options)
    torch.testing.assert_close(attended.out, weights @ v / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(attended.denominator, weights.mean(-1, keepdim=True))


def test_a_negative_scale_flips_the_logits() -> None:
    q, k, v = tensors()
    q = q * 0.2
    torch.testing.assert_close(
        taylor_attention(q, k, v, -0.25, 4).out, taylor_attention(-q, k, v, 0.25, 4).out
    )


def test_blocks_that_do_not_divide_are_refused_by_name() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="sub_head_blocks: 3 does not divide head_dim 16"):
        attend(q, k, v, 3, options=Options(sub_head_blocks=3))
    with pytest.raises(ValueError, match="sub_head_blocks: 4 does not divide feature_projection"):
        attend(q, k, v, 3, options=Options(sub_head_blocks=4, feature_projection=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_projection_of_full_rank_is_exact(dtype: torch.dtype) -> None:
    q, k, _ = (x.to(dtype) for x in tensors())
    a, b = factors(q, k, None, 16)
    torch.testing.assert_close((q @ a) @ (k @ b).mT, q @ k.mT, rtol=1e-3, atol=1e-3)


def test_a_projection_keeps_as_much_as_the_best_of_its_rank() -> None:
    q, k, _ = tensors(400, 400)
    spread = torch.linspace(2, 0.1, 16).double()
    q, k = q * spread, k * spread.flip(0).roll(3)
    error = (q @ k.mT) - (q @ factors(q, k, None, 5)[0]) @ (k @ factors(q, k, None, 5)[1]).mT

    def root(moment: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(moment)
        return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT

    whitened = root(q.mT @ q / 400) @ root(k.mT @ k / 400)
    least = torch.linalg.svdvals(whitened)[..., 5:].square().sum(-1)
    torch.testing.assert_close(error.square().mean((-2, -1)), least, rtol=0.01, atol=0.0)


def test_a_projection_survives_heads_that_use_few_coordinates() -> None:
    q, k, v = (x.float() for x in tensors())
    q[..., 4:], k[..., 3:] = 0.0, 0.0
    out = attend(q * 0.5, k, v, 7, options=Options(feature_projection=8)).out
    assert float(nmse(out, reference_attention(q * 0.5, k, v, 0.25))) < TOLERANCE


def test_second_moments_are_weighted() -> None:
    _, k, _ = tensors()
    weights = torch.zeros(2, 3, 60, dtype=torch.float64)
    weights[:, :, :20] = 2.0
    torch.testing.assert_close(
        second_moment(k, weights), second_moment(k[:, :, :20], None), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    q, k, _ = tensors()
    with pytest.raises(ValueError, match=f"feature_projection: {rank} is not allowed"):
        factors(q, k, None, rank)
