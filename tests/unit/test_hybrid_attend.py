"""Hybrid attention against its definition in float64, and what tells its two forms apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hybrid_reference import additive, form, joint

from attnscope.attention.hybrid import near
from attnscope.attention.hybrid.attend import Form, hybrid_attention
from attnscope.attention.hybrid.basis import Basis, Key, fit, identity
from attnscope.attention.taylor.shaping import NormRule

SCALE = 0.25


def tensors(
    tokens: int, seed: int = 0, batch: int = 1, heads: int = 2, head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:  # fmt: skip
    """Query, key and value, and query and key before rotary embedding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, batch, heads, tokens, head_dim)
    means = torch.randn(5, 1, heads, 1, head_dim, generator=generator)
    return list((torch.randn(shape, generator=generator) + 0.5 * means).to(dtype))


def finder(kept: list[Basis], samples: int = 64, fitted: bool = True) -> Any:
    """A basis as the variant finds it, which the test looks at too."""

    def find(query: Any, key: Any, mean: Any, dtype: torch.dtype) -> Basis:
        which = Key("x", query.shape[1], query.shape[3], 8, dtype, query.device)
        kept.append(fit(which, query, key, mean, samples) if fitted else identity(which))
        return kept[-1]

    return find


def run(parts: list[torch.Tensor], f: Form, **options: Any) -> tuple[Any, Basis | None]:
    query, key, value, *pre = parts
    kept: list[Basis] = []
    find = finder(kept, **options)
    attended = hybrid_attention(query, key, value, SCALE, (pre[0], pre[1]), f, find)
    return attended, kept[0] if kept else None


def close(out: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (out.double() - expected).square().sum() / expected.square().sum()
    assert float(error) < tolerance**2


@pytest.mark.parametrize("combine", ["joint", "additive"])
@pytest.mark.parametrize(("tokens", "prefix"), [(63, 7), (111, 0), (201, 13), (30, 1)])
def test_it_is_what_its_definition_says(tokens: int, prefix: int, combine: str) -> None:
    parts = tensors(tokens, batch=2)
    f = form(prefix=prefix, combine=combine, weight=0.7)
    attended, basis = run(parts, f)
    assert basis is not None and basis.fitted
    a, b = basis.of_query, basis.of_key
    query, key, value, *pre = parts
    arguments = (query, key, value, SCALE, (pre[0], pre[1]), f, a, b)
    if combine == "additive":
        close(attended.out, additive(*arguments), 1e-5)
        assert attended.log_mass is None
        return
    expected, mass = joint(*arguments)
    close(attended.out, expected, 1e-5)
    assert torch.allclose(attended.log_mass.double(), mass, atol=1e-5)


@pytest.mark.parametrize("combine", ["joint", "additive"])
@pytest.mark.parametrize("rule", [NormRule(power=0.5), NormRule(clip=1.5), NormRule(0.25, 1.2)])
def test_norms_change_in_the_few_coordinates_and_nothing_near(
    rule: NormRule, combine: str
) -> None:
    parts = tensors(111)
    f = form(norm=rule, combine=combine)
    attended, basis = run(parts, f)
    query, key, value, *pre = parts
    assert basis is not None
    arguments = (query, key, value, SCALE, (pre[0], pre[1]), f, basis.of_query, basis.of_key)
    close(attended.out, joint(*arguments)[0] if combine == "joint" else additive(*arguments), 1e-5)
    plain, _ = run(parts, form(combine=combine))
    assert not torch.allclose(attended.out[:, :, 7:], plain.out[:, :, 7:], atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 90),
    prefix=st.integers(0, 20),
    window=st.integers(1, 60),
    chunk=st.integers(1, 40),
    terms=st.sampled_from([1, 3, 5]),
    centre=st.booleans(),
    seed=st.integers(0, 5),
)
def test_any_shape_of_window_is_what_its_definition_says(
    tokens: int, prefix: int, window: int, chunk: int, terms: int, centre: bool, seed: int
) -> None:
    prefix = min(prefix, tokens - 1)
    parts = tensors(tokens, seed)
    f = form(prefix=prefix, window=window, chunk=chunk, terms=terms, centre=centre)
    attended, basis = run(parts, f, fitted=False)
    query, key, value, *pre = parts
    if basis is None:
        assert window + chunk >= tokens - prefix
        return
    expected, mass = joint(
        query, key, value, SCALE, (pre[0], pre[1]), f, basis.of_query, basis.of_key
    )
    close(attended.out, expected, 1e-4)
    assert torch.allclose(attended.log_mass.double(), mass, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_window_over_everything_is_exact_attention(weight: float) -> None:
    query, key, value, *_ = parts = tensors(75)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE)
    attended, _ = run(parts, form(window=75, weight=weight))
    torch.testing.assert_close(attended.out, exact, atol=1e-5, rtol=1e-5)
    logits = SCALE * query @ key.mT
    assert torch.allclose(attended.log_mass, logits.logsumexp(-1), atol=1e-5)


def test_constant_values_come_back_only_where_nothing_counts_twice() -> None:
    parts = tensors(120)
    parts[2] = torch.full_like(parts[2], 3.0)
    out = run(parts, form())[0].out
    torch.testing.assert_close(out, parts[2], atol=1e-5, rtol=0)
    added = run(parts, form(combine="additive", weight=0.1))[0].out
    assert torch.allclose(added, torch.full_like(added, 3.3), atol=1e-4)


def test_more_terms_and_all_coordinates_tend_to_exact_attention_where_nothing_rotates() -> None:
    query, key, value, *_ = tensors(150)
    query, key = 0.5 * query, 0.5 * key
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE)
    errors = []
    for terms in (1, 3, 5):
        f = form(terms=terms, rank=16)
        found = hybrid_attention(
            query, key, value, SCALE, (query, key), f,
            lambda q, k, mean, dtype: identity(Key("x", 2, 16, 16, dtype, q.device)),
        )  # fmt: skip
        errors.append(float((found.out - exact).square().sum() / exact.square().sum()))
    assert errors[0] > 20 * errors[1] > 400 * errors[2]
    assert errors[2] < 1e-6


def test_text_is_seen_from_everywhere_and_sees_everything() -> None:
    parts = tensors(200)
    key, value = parts[1], parts[2]
    f = form(prefix=5, window=8, chunk=8, weight=0.0)
    before = run(parts, f)[0].out
    value[:, :, 3] += 100.0
    after = run(parts, f)[0].out
    assert bool(((after - before).abs().amax(dim=-1) > 1e-3).all())
    exact = torch.nn.functional.scaled_dot_product_attention(
        parts[0][:, :, :5], key, value, scale=SCALE
    )
    torch.testing.assert_close(after[:, :, :5], exact, atol=1e-4, rtol=1e-4)


def test_without_a_global_part_nothing_far_is_seen_and_nothing_needs_query_before_rope() -> None:
    query, key, value, *_ = tensors(100)
    f = form(prefix=0, window=8, chunk=8, weight=0.0)
    out = hybrid_attention(query, key, value, SCALE, None, f, finder([])).out
    value[:, :, 60:] = float("nan")
    again = hybrid_attention(query, key, value, SCALE, None, f, finder([])).out
    assert torch.equal(out[:, :, :48], again[:, :, :48])
    with pytest.raises(ValueError, match="pre_rope: is None"):
        hybrid_attention(query, key, value, SCALE, None, form(), finder([]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("combine", ["joint", "additive"])
def test_half_precision_sums_in_float32(dtype: torch.dtype, wide: bool, combine: str) -> None:
    parts = tensors(800, dtype=dtype)
    f = form(prefix=20, window=64, chunk=32, wide=wide, combine=combine, weight=0.5)
    attended, basis = run(parts, f)
    assert attended.out.dtype == dtype
    assert basis is not None
    assert basis.of_query.dtype == (torch.float32 if wide else dtype)
    query, key, value, *pre = parts
    arguments = (query, key, value, SCALE, (pre[0], pre[1]), f, basis.of_query, basis.of_key)
    expected = joint(*arguments)[0] if combine == "joint" else additive(*arguments)
    # Rounding of operands, which doesn't grow with the tokens that are summed over.
    close(attended.out, expected, 0.02)
    if attended.log_mass is not None:
        assert attended.log_mass.dtype == torch.float32


def test_float64_stays_float64() -> None:
    parts = tensors(90, dtype=torch.float64)
    attended, basis = run(parts, form())
    query, key, value, *pre = parts
    assert basis is not None
    expected, _ = joint(
        query, key, value, SCALE, (pre[0], pre[1]), form(), basis.of_query, basis.of_key
    )
    close(attended.out, expected, 1e-12)


def test_heads_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnscope.attention.taylor import kernel

    parts = tensors(130, batch=2, heads=4)
    whole = run(parts, form())[0]
    small = kernel.Budget(block=4 * 2**20, sums=2**20, heads=1)
    monkeypatch.setattr(kernel, "CPU_BUDGET", small)
    split = run(parts, form())[0]
    torch.testing.assert_close(split.out, whole.out, atol=1e-6, rtol=1e-6)
    assert torch.allclose(split.least, whole.least)


def test_an_even_number_of_terms_can_leave_bad_denominators_out() -> None:
    parts = tensors(160)
    parts[3], parts[4] = 6 * parts[3], -6 * parts[4]
    attended, _ = run(parts, form(terms=2, prefix=0, centre=False))
    assert 0.0 < float(attended.bad) < 1.0
    assert float(attended.least) < 0.0
    assert bool(attended.out.isfinite().all())
    odd, _ = run(parts, form(terms=3, prefix=0, centre=False))
    assert float(odd.least) >= 0.49
    assert float(odd.bad) == 0.0


def test_the_mass_is_the_same_without_fused_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, *_ = tensors(70)
    fused = near.attend_with_mass(query, key, value, SCALE)

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("not on this device")

    monkeypatch.setattr(near, "_cpu", refuse)
    monkeypatch.setattr(near, "_refused", set())
    plain = near.attend_with_mass(query, key, value, SCALE)
    assert near._refused
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(near, "_LOGITS_BYTES", 1)
    for one, other in zip(near.attend_with_mass(query, key, value, SCALE), plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
