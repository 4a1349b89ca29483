"""Shaping of query and key, and what is measured of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnscope.attention.exact import reference_attention
from attnscope.attention.samples import sample_call, statistics
from attnscope.attention.settings import TaylorSettings
from attnscope.attention.taylor.shaping import NormRule, norm_rule, shape
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.variant import Call

SCALE = 16**-0.5


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=generator, dtype=torch.float64).unbind(0)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@given(
    norm=st.floats(1e-3, 1e3),
    power=st.floats(0.0, 1.0),
    clip=st.one_of(st.just(0.0), st.floats(0.1, 100.0)),
)
def test_the_norm_after_shaping(norm: float, power: float, clip: float) -> None:
    x = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x / x.norm() * norm
    shaped = NormRule(power, clip).apply(x)
    # The clip looks at the norm that the power leaves, not at the original one.
    left = norm ** (1.0 - power)
    expected = min(left, clip) if clip else left
    assert float(shaped.norm()) == pytest.approx(expected, rel=1e-9)
    assert float(torch.dot(shaped, x)) == pytest.approx(expected * norm, rel=1e-9)


def test_a_zero_vector_stays_zero_and_a_nan_stays_in_its_row() -> None:
    x = torch.ones(3, 4)
    x[0] = 0.0
    x[1, 2] = float("nan")
    shaped = NormRule(power=0.5, clip=1.0).apply(x)
    assert shaped[0].eq(0.0).all() and shaped[1].isnan().all() and shaped[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_normalized_rows_have_norm_one_in_the_dtype_given(dtype: torch.dtype) -> None:
    q, k, _ = tensors(dtype)
    shaped = shape(q, k, SCALE, TaylorSettings(qk_normalize=True), 0.5)
    assert shaped.query.dtype == shaped.key.dtype == dtype
    norms = torch.cat([shaped.query, shaped.key], dim=2).double().norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0.0, atol=1e-2)


def test_what_changes_nothing_copies_nothing() -> None:
    q, k, _ = tensors()
    shaped = shape(q, k, SCALE, TaylorSettings(), 0.5)
    assert shaped.query is q and shaped.key is k and shaped.scale == SCALE


@pytest.mark.parametrize(
    ("sigma", "limit", "shaped"),
    [(0.5, 0.0, True), (0.5, 0.5, True), (0.5, 0.49, False), (None, 0.5, False), (None, 0, True)],
)
def test_the_sigma_gate_holds_for_norms_alone(
    sigma: float | None, limit: float, shaped: bool
) -> None:
    settings = TaylorSettings(qk_norm_power=0.3, scale_mul=0.5, qk_norm_sigma_max=limit)
    assert norm_rule(settings, sigma).changes is shaped
    q, k, _ = tensors()
    effective = shape(q, k, SCALE, settings, sigma)
    assert effective.scale == SCALE / 2
    assert (effective.query is not q) is shaped


@pytest.mark.parametrize(
    "settings",
    [{"qk_normalize": True}, {"qk_norm_power": 0.5, "qk_norm_clip": 1.5}, {"scale_mul": 0.5}],
)
def test_the_variant_says_which_attention_it_approximates(settings: dict[str, Any]) -> None:
    q, k, v = tensors()
    call = Call(
        TaylorSettings(P=7, **settings), None, 0.5, 0, SCALE, log_mass_rows=torch.arange(40)
    )
    result = TaylorVariant().attend(q, k, v, call)
    assert result.out is not None and result.effective is not None
    shaped = result.effective
    exact = reference_attention(shaped.query, shaped.key, v, shaped.scale)
    torch.testing.assert_close(result.out, exact, rtol=0.0, atol=1e-3)
    sample = sample_call(
        q, k, v, result.out, SCALE, None, 40, 0,
        effective=shaped, log_mass=result.log_mass,
    )  # fmt: skip
    (stats,) = statistics([sample])
    assert float(stats["nmse_eff"]) < 1e-4 < 1e-3 < float(stats["nmse"])
    assert abs(float(stats["log_mass_bias"])) < 1e-3


def test_unshaped_attention_has_nothing_effective() -> None:
    q, k, v = tensors()
    call = Call(TaylorSettings(), None, 0.5, 0, SCALE)
    assert TaylorVariant().attend(q, k, v, call).effective is None
