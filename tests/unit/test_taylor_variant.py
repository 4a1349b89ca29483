"""Gates, masks and fallbacks of the Taylor variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnscope.attention.exact import reference_attention
from attnscope.attention.quality import nmse
from attnscope.attention.reasons import Fallback, Gate
from attnscope.attention.settings import TaylorSettings
from attnscope.attention.sums_paths import SumsPath
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.variant import Call, LayerId

SCALE = 16**-0.5


def call(
    layer: LayerId | None = None,
    sigma: float | None = 0.5,
    mask: torch.Tensor | None = None,
    **settings: Any,
) -> Call:
    return Call(
        TaylorSettings(min_tokens=settings.pop("min_tokens", 0), **settings),
        layer or LayerId("single", 3),
        sigma,
        0,
        SCALE,
        mask,
    )


def tensors(tokens: int = 50, factor: float = 0.5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2, 2, tokens, 16, generator=generator).unbind(0)
    return q * factor, k, v


@pytest.mark.parametrize(
    ("settings", "sigma", "expected"),
    [
        ({}, 0.5, None),
        ({"enabled": False}, 0.5, Gate.DISABLED),
        ({"min_tokens": 51}, 0.5, Gate.BELOW_MIN_TOKENS),
        ({"min_tokens": 50}, 0.5, None),
        ({"taylor_sigma_max": 0.49}, 0.5, Gate.SIGMA_ABOVE_MAX),
        ({"taylor_sigma_max": 0.5}, 0.5, None),
        ({"taylor_sigma_max": 0.5}, float(torch.tensor(0.5000001)), None),
        ({"taylor_sigma_max": 0.5}, None, Gate.SIGMA_UNKNOWN),
        ({"taylor_layer_start": 4}, 0.5, Gate.LAYER_OUTSIDE_RANGE),
        ({"taylor_layer_start": 3, "taylor_layer_end": 3}, 0.5, None),
        ({"taylor_layer_end": 2}, 0.5, Gate.LAYER_OUTSIDE_RANGE),
        ({"taylor_block_type": "double"}, 0.5, Gate.BLOCK_TYPE),
        ({"taylor_block_type": "single"}, 0.5, None),
    ],
)
def test_gates(settings: dict[str, Any], sigma: float | None, expected: Gate | None) -> None:
    q, k, _ = tensors()
    assert TaylorVariant().gate(q, k, call(sigma=sigma, **settings)) is expected


def test_gates_need_to_know_the_layer() -> None:
    q, k, _ = tensors()
    unknown = Call(TaylorSettings(min_tokens=0, taylor_layer_end=5), None, 0.5, 0, SCALE)
    assert TaylorVariant().gate(q, k, unknown) is Gate.LAYER_UNKNOWN


def test_cross_attention_is_a_choice() -> None:
    q, k, _ = tensors()
    variant = TaylorVariant()
    assert variant.gate(q[:, :, :9], k, call()) is None
    assert variant.gate(q[:, :, :9], k, call(allow_cross_attention=False)) is Gate.CROSS_ATTENTION


def test_output_has_the_dtype_of_the_query_and_statistics_stay_tensors() -> None:
    q, k, v = (t.to(torch.bfloat16) for t in tensors())
    result = TaylorVariant().attend(q, k, v, call())
    assert result.out is not None and result.out.dtype == torch.bfloat16
    assert result.out.shape == q.shape
    # What shapes alone say is a number already; nothing else may be read within the call.
    assert {n for n, v in result.stats.items() if not isinstance(v, torch.Tensor)} == {
        "head_dim",
        "feature_dim",
        "sums_path",
    }
    assert SumsPath(int(result.stats["sums_path"])).path == "torch"
    assert float(result.stats["denom_bad_frac"]) == 0.0


def test_more_terms_come_closer_to_exact() -> None:
    q, k, v = tensors()
    exact = reference_attention(q, k, v, SCALE)
    errors = []
    for terms in (1, 3, 5):
        out = TaylorVariant().attend(q, k, v, call(P=terms)).out
        assert out is not None
        errors.append(float(nmse(out, exact)))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_scale_mul_softens_like_a_smaller_scale() -> None:
    q, k, v = tensors()
    halved = TaylorVariant().attend(q, k, v, call(P=5, scale_mul=0.5)).out
    assert halved is not None
    assert float(nmse(halved, reference_attention(q, k, v, SCALE / 2))) < 1e-6


@pytest.mark.parametrize("form", ["boolean", "additive", "expanded"])
def test_key_masks_are_applied(form: str) -> None:
    q, k, v = tensors()
    keep = torch.arange(50) < 30
    mask = keep[None, None, None, :]
    if form == "additive":
        mask = torch.where(mask, 0.0, float("-inf"))
    if form == "expanded":
        mask = mask.expand(2, 2, 50, 50)
    out = TaylorVariant().attend(q, k, v, call(P=5, mask=mask)).out
    assert out is not None
    expected = reference_attention(q, k[:, :, :30], v[:, :, :30], SCALE)
    assert float(nmse(out, expected)) < 1e-4


def test_an_all_zero_additive_mask_masks_nothing() -> None:
    q, k, v = tensors()
    plain = TaylorVariant().attend(q, k, v, call()).out
    masked = TaylorVariant().attend(q, k, v, call(mask=torch.zeros(1, 1, 1, 50))).out
    torch.testing.assert_close(plain, masked)


def test_masks_that_differ_from_query_to_query_fall_back() -> None:
    q, k, v = tensors()
    mask = torch.ones(1, 1, 50, 50, dtype=torch.bool).tril()
    result = TaylorVariant().attend(q, k, v, call(mask=mask))
    assert result.out is None and result.fallback is Fallback.MASK


def test_a_batch_row_that_may_attend_to_nothing_falls_back() -> None:
    q, k, v = tensors()
    mask = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    mask[1] = False
    result = TaylorVariant().attend(q, k, v, call(mask=mask, early_probe=False))
    assert result.out is None and result.fallback is Fallback.DENOMINATOR


def test_negative_denominators_fall_back_with_their_statistics() -> None:
    q, k, v = tensors(factor=6.0)
    result = TaylorVariant().attend(q, k, v, call(P=4, early_probe=False))
    assert result.out is None and result.fallback is Fallback.DENOMINATOR
    assert float(result.stats["denom_min"]) < 0 < float(result.stats["denom_bad_frac"])


def test_a_tolerated_share_of_bad_denominators_is_clamped() -> None:
    q, k, v = tensors(factor=6.0)
    share = float(
        TaylorVariant().attend(q, k, v, call(P=4, early_probe=False)).stats["denom_bad_frac"]
    )
    tolerant = call(P=4, early_probe=False, denom_fallback_frac_limit=share + 0.01)
    strict = call(P=4, early_probe=False, denom_fallback_frac_limit=share / 2)
    assert TaylorVariant().attend(q, k, v, tolerant).out is not None
    assert TaylorVariant().attend(q, k, v, strict).out is None
    never = call(P=4, fallback_on_negative=False)
    out = TaylorVariant().attend(q, k, v, never).out
    assert out is not None and bool(out.isfinite().all())


def test_nan_input_counts_as_a_bad_denominator() -> None:
    q, k, v = tensors()
    k[0, 0, 0, 0] = float("nan")
    result = TaylorVariant().attend(q, k, v, call())
    assert result.fallback is Fallback.DENOMINATOR
    assert float(result.stats["denom_bad_frac"]) > 0


@pytest.mark.parametrize(
    ("settings", "reason", "named"),
    [
        ({"max_head_dim": 15}, Fallback.HEAD_DIM, "16"),
        ({"max_feature_dim_R": 100}, Fallback.FEATURE_DIM, "153"),
    ],
)
def test_limits_fall_back_and_name_the_rejected_size(
    settings: dict[str, Any], reason: Fallback, named: str
) -> None:
    q, k, v = tensors()
    result = TaylorVariant().attend(q, k, v, call(**settings))
    assert result.out is None and result.fallback is reason
    assert named in result.detail


def test_blocks_that_do_not_divide_the_head_fall_back() -> None:
    result = TaylorVariant().attend(*tensors(), call(sub_head_blocks=3))
    assert result.out is None and result.fallback is Fallback.HEAD_DIM
    assert "sub_head_blocks: 3 does not divide head_dim 16" in result.detail


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"feature_projection": 8}, 45),
        ({"sub_head_blocks": 4}, 15),
        ({"sub_head_blocks": 4, "sub_head_mode": "independent"}, 15),
        ({"sub_head_blocks": 2, "feature_projection": 8}, 15),
    ],
)
def test_the_feature_limit_counts_one_series(settings: dict[str, Any], features: int) -> None:
    q, k, v = tensors()
    allowed = TaylorVariant().attend(q, k, v, call(max_feature_dim_R=features, **settings))
    refused = TaylorVariant().attend(q, k, v, call(max_feature_dim_R=features - 1, **settings))
    assert allowed.out is not None and refused.fallback is Fallback.FEATURE_DIM


@pytest.mark.parametrize(
    "setting",
    [
        {"centre_keys": False, "centre_queries": False},
        {"centre_queries": False},
        {"feature_projection": 4},
        {"sub_head_blocks": 4},
        {"sub_head_blocks": 4, "sub_head_mode": "independent"},
    ],
)
def test_every_setting_of_the_expansion_reaches_it(setting: dict[str, Any]) -> None:
    q, k, v = tensors()
    q, k = q + 1.0, k + 1.0
    plain = TaylorVariant().attend(q, k, v, call()).out
    changed = TaylorVariant().attend(q, k, v, call(**setting, fallback_on_negative=False)).out
    assert plain is not None and changed is not None
    assert float(nmse(changed, plain)) > 1e-5
