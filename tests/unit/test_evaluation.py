"""Evaluation: errors, log mass, work and reasons against their definitions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from attnscope.attention import masks
from attnscope.attention.evaluation import Case, Configuration, evaluate, reference
from attnscope.attention.exact import ExactVariant, reference_attention
from attnscope.attention.settings import MonitorSettings, TaylorSettings, TiledSettings
from attnscope.attention.taylor.features import feature_dim
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.tiled.variant import TiledVariant
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.variant import Call

SCALE = 16**-0.5


def case(mask: torch.Tensor | None = None, factor: float = 0.5, tokens: int = 60) -> Case:
    generator = torch.Generator().manual_seed(2)
    # Means make centring matter.
    q, k, v = (torch.randn(3, 2, 2, tokens, 16, generator=generator) + 0.7).unbind(0)
    return Case("a", "single.3", 2, 0.5, q * factor, k * factor, v, SCALE, mask)


def taylor(label: str = "t", **settings: Any) -> Configuration:
    return Configuration(label, "taylor", TaylorSettings(min_tokens=0, **settings))


def key_mask(form: str) -> torch.Tensor | None:
    keep = torch.arange(60)[None, None, None] % 3 != 0
    row = torch.linspace(-2, 3, 60)[None, None, None]
    return {
        "none": None, "boolean": keep, "additive": row,
        "padding": torch.where(keep, row, -torch.inf),
    }[form]  # fmt: skip


@pytest.mark.parametrize("form", ["none", "boolean", "additive", "padding"])
@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("keys", [True, False])
def test_log_mass_tends_to_the_logsumexp_of_the_logits(
    form: str, queries: bool, keys: bool
) -> None:
    made = case(key_mask(form))
    settings = taylor(P=8, centre_queries=queries, centre_keys=keys).settings
    rows = torch.tensor([0, 7, 8, 30, 59])
    call = Call(settings, None, 0.5, 0, SCALE, made.mask, log_mass_rows=rows)
    mass = TaylorVariant().attend(made.query, made.key, made.value, call).log_mass
    logits = made.query.double() @ made.key.double().transpose(-2, -1) * SCALE
    exact = masks.apply(logits, made.mask).logsumexp(dim=-1).index_select(2, rows)
    assert mass is not None and mass.shape == (2, 2, 5) and mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), exact, atol=2e-3, rtol=0)


def test_log_mass_is_made_only_where_it_is_wanted_and_means_something() -> None:
    made = case()
    plain = Call(taylor().settings, None, 0.5, 0, SCALE)
    assert TaylorVariant().attend(made.query, made.key, made.value, plain).log_mass is None
    split = taylor(sub_head_blocks=2, sub_head_mode="independent").settings
    wanted = Call(split, None, 0.5, 0, SCALE, log_mass_rows=torch.arange(60))
    assert TaylorVariant().attend(made.query, made.key, made.value, wanted).log_mass is None


@pytest.mark.parametrize("form", ["none", "boolean", "padding"])
def test_the_reference_is_exact_attention_in_float64(form: str) -> None:
    made = case(key_mask(form))
    found = reference(made, 0, 0)
    expected = reference_attention(made.query, made.key, made.value, SCALE, made.mask)
    torch.testing.assert_close(found.out, expected)
    assert found.out.dtype == torch.float64 and len(found.rows) == 60


def test_errors_are_those_of_the_definitions() -> None:
    made = case()
    (outcome,) = evaluate(made, [taylor(P=3)], queries=0, pairs=0)
    call = Call(taylor(P=3).settings, None, 0.5, 0, SCALE, log_mass_rows=torch.arange(60))
    result = TaylorVariant().attend(made.query, made.key, made.value, call)
    exact = reference_attention(made.query, made.key, made.value, SCALE)
    assert result.out is not None and result.log_mass is not None
    error = (result.out - exact).square().sum() / exact.square().sum()
    logits = made.query.double() @ made.key.double().transpose(-2, -1) * SCALE
    bias = (result.log_mass - logits.logsumexp(-1)).mean()
    assert outcome.nmse == pytest.approx(float(error), rel=1e-5)
    assert outcome.log_mass_bias == pytest.approx(float(bias), rel=1e-5)
    assert outcome.cosine == pytest.approx(
        float(torch.nn.functional.cosine_similarity(result.out, exact, dim=-1).mean()), rel=1e-5
    )
    assert (outcome.reference, outcome.queries, outcome.ms) == ("float64", 60, None)


def test_more_terms_err_less_and_a_truncated_series_loses_mass() -> None:
    few, more, exact = evaluate(
        case(factor=0.9),
        [taylor("few", P=3), taylor("more", P=5), Configuration("e", "exact", MonitorSettings())],
        queries=20,
        pairs=1,
    )
    assert few.nmse is not None and more.nmse is not None and exact.nmse is not None
    assert few.nmse > 5 * more.nmse > 100 * exact.nmse
    assert few.log_mass_bias is not None and more.log_mass_bias is not None
    assert few.log_mass_bias < more.log_mass_bias < 0
    assert exact.log_mass_bias is None and exact.flops_ratio == 1.0
    for outcome in (few, more, exact):
        assert outcome.queries == 20
        assert outcome.ms and outcome.exact_ms and outcome.time_ratio


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"taylor_sigma_max": 0.4}, "sigma_above_max"),
        ({"taylor_layer_end": 2}, "layer_outside_range"),
        ({"max_feature_dim_R": 10}, "feature_dim: R 153 > max_feature_dim_R 10"),
    ],
)
def test_where_exact_runs_instead_only_the_reason_is_given(
    settings: dict[str, Any], reason: str
) -> None:
    (outcome,) = evaluate(case(), [taylor(**settings)], pairs=1)
    assert outcome.reason.startswith(reason)
    assert outcome.nmse is None and outcome.ms is None and outcome.flops is None


def test_a_long_sequence_is_compared_in_float32_on_few_queries() -> None:
    made = case(tokens=4700)
    (outcome,) = evaluate(made, [taylor(P=2, fallback_on_negative=False)], queries=9, pairs=0)
    assert (outcome.reference, outcome.queries) == ("float32", 9)


def test_flops_follow_from_tokens_and_features() -> None:
    shape, keys = (2, 3, 100, 64), (2, 3, 50, 64)
    assert ExactVariant.flops(shape, keys, MonitorSettings()) == 4 * 6 * 100 * 50 * 64

    def flops(**settings: Any) -> float:
        whole = TaylorSettings(**{"feature_projection": 0} | settings)
        return TaylorVariant.flops(shape, keys, whole) / (6 * 150)

    assert flops(P=3) == feature_dim(64, 3) * (1 + 2 * 65)
    assert flops(P=3, feature_projection=16) == feature_dim(16, 3) * 131 + 2 * 64 * 16
    assert flops(P=3, sub_head_blocks=4) == 4 * feature_dim(16, 3) * 131
    independent = flops(P=3, sub_head_blocks=4, sub_head_mode="independent")
    assert independent == 4 * feature_dim(16, 3) * (1 + 2 * 17)
    with pytest.raises(ValueError, match="sub_head_blocks: 5 does not divide"):
        flops(sub_head_blocks=5)
    assert math.isfinite(flops(P=8, feature_projection=8))


def test_a_case_with_a_layout_is_tiled_and_one_without_says_why_not() -> None:
    tiled = Configuration("tiled", "tiled", TiledSettings(min_tokens=0, dense_first_steps=0))
    made = case(tokens=5 + 32 * 40)
    (outcome,) = evaluate(made, [tiled], pairs=0)
    assert outcome.reason.startswith("layout: the model does not say")
    layout = TokenLayout(5, ((32, 40),))
    (outcome,) = evaluate(dataclasses.replace(made, layout=layout), [tiled], pairs=0)
    assert outcome.reason == ""
    assert outcome.nmse is not None and outcome.log_mass_bias is not None
    assert outcome.flops == TiledVariant.flops(
        made.query.shape, made.key.shape, tiled.settings, layout
    )
