"""The hybrid as a variant: gates, text, fits that are remembered, fallbacks with their reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnscope.attention.hybrid import basis as bases
from attnscope.attention.hybrid.basis import Bases, Key, fit, identity
from attnscope.attention.hybrid.means import Means, means
from attnscope.attention.hybrid.variant import HybridVariant
from attnscope.attention.reasons import Fallback, Gate
from attnscope.attention.settings import HybridSettings
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.variant import Call, LayerId, RunInfo, exact_flops

SCALE = 0.25
LAYOUT = TokenLayout(6, ((10, 12),))


def tensors(tokens: int = 126, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(5, 1, 2, tokens, 16, generator=generator).to(dtype))


LAYER = LayerId("single", 3)


def call(layer: LayerId | None = LAYER, **changes: Any) -> Call:
    about = {"sigma": 0.5, "step": 0, "scale": SCALE, "layout": LAYOUT}
    about |= {name: changes.pop(name) for name in (*about, "mask", "pre_rope") if name in changes}
    settings = HybridSettings(**{"min_tokens": 0, "local_window": 16, "local_chunk": 16} | changes)
    return Call(settings=settings, layer=layer, log_mass_rows=torch.arange(3), **about)


def attend(variant: HybridVariant | None = None, **changes: Any) -> Any:
    query, key, value, *pre = tensors()
    changes.setdefault("pre_rope", (pre[0], pre[1]))
    return (variant or HybridVariant()).attend(query, key, value, call(**changes))


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({}, None),
        ({"enabled": False}, Gate.DISABLED),
        ({"min_tokens": 127}, Gate.BELOW_MIN_TOKENS),
        ({"sigma_max": 0.4}, Gate.SIGMA_ABOVE_MAX),
        ({"sigma_max": 0.5}, None),
        ({"layer_start": 4}, Gate.LAYER_OUTSIDE_RANGE),
        ({"layer_end": 2}, Gate.LAYER_OUTSIDE_RANGE),
        ({"block_type": "double"}, Gate.BLOCK_TYPE),
        ({"local_window": 0}, Gate.WINDOW_FULL),
        ({"local_window": 120}, Gate.WINDOW_FULL),
        ({"local_window": 119}, None),
        ({"local_window": 0, "combine": "additive"}, None),
        (
            {"local_window_min": 8, "local_window_sigma_low": 0.1, "local_window_sigma_high": 0.4},
            Gate.WINDOW_FULL,
        ),
        (
            {"local_window_min": 8, "local_window_sigma_low": 0.6, "local_window_sigma_high": 0.9},
            None,
        ),
    ],
)
def test_gates(changes: dict[str, Any], gate: Gate | None) -> None:
    query, key, *_ = tensors()
    assert HybridVariant().gate(query, key, call(**changes)) == gate


def test_other_tokens_in_the_key_run_exact() -> None:
    query, key, *_ = tensors()
    assert HybridVariant().gate(query[:, :, :9], key, call()) == Gate.CROSS_ATTENTION


def test_every_mask_runs_exact() -> None:
    for mask in (torch.ones(1, 1, 1, 126, dtype=torch.bool), torch.zeros(1, 1, 126, 126)):
        assert attend(mask=mask).fallback == Fallback.MASK


def test_text_is_found_or_named_or_the_call_runs_exact() -> None:
    found = attend()
    assert torch.equal(found.out, attend(prefix_tokens=6, layout=None).out)
    assert not torch.allclose(found.out, attend(prefix_tokens=0).out)
    assert attend(layout=None).fallback == Fallback.TEXT_UNKNOWN
    refused = attend(prefix_tokens=126)
    assert refused.fallback == Fallback.LAYOUT
    assert "prefix_tokens 126 leaves nothing of 126 tokens" in refused.detail


def test_without_query_before_rope_the_global_part_runs_exact() -> None:
    assert attend(pre_rope=None).fallback == Fallback.PRE_ROPE
    assert attend(pre_rope=None, global_weight=0.0).out is not None
    ramp = {"global_sigma_low": 0.1, "global_sigma_high": 0.5}
    assert attend(pre_rope=None, **ramp).out is not None


def test_a_large_feature_dimension_is_refused_and_named() -> None:
    refused = attend(global_P=5, max_feature_dim_R=4000)
    assert refused.fallback == Fallback.FEATURE_DIM
    assert refused.detail == "R 4845 > max_feature_dim_R 4000"
    assert refused.stats["feature_dim"] == 4845


def test_bad_denominators_fall_back_where_they_are_too_many() -> None:
    *_, pre_query, pre_key = tensors()
    pre = (pre_query, pre_key)
    bad = {"pre_rope": (6 * pre[0], -6 * pre[1]), "global_P": 2, "global_centre": False}
    assert attend(**bad).fallback == Fallback.DENOMINATOR
    tolerated = attend(**bad, denom_fallback_frac_limit=1.0)
    assert 0.0 < float(tolerated.stats["denom_bad_frac"]) <= 1.0
    assert bool(tolerated.out.isfinite().all())
    assert attend(**bad, fallback_on_negative=False).out is not None


def test_an_odd_number_of_terms_never_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(tensor: torch.Tensor) -> bool:
        raise AssertionError("the call waited for the device")

    query, key, value, *pre = tensors()
    about = call(pre_rope=(pre[0], pre[1]))
    variant = HybridVariant()
    monkeypatch.setattr(torch.Tensor, "__bool__", waits)
    assert variant.attend(query, key, value, about).out is not None


def which(layer: str = "single.3", **changes: Any) -> Key:
    values = dict(
        layer=layer, heads=2, head_dim=16, rank=4, dtype=torch.float32, device=torch.device("cpu")
    )
    return Key(**(values | changes))


def none_taken(query: torch.Tensor, key: torch.Tensor) -> Means:
    return means(query, key, torch.float32, centre=False)


def test_a_fit_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    spread = 3.0 * 0.6 ** torch.arange(16)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    query, key = (torch.randn(2, 1, 2, 400, 16, generator=generator) * spread) @ turn
    found = fit(which(), query, key, none_taken(query, key), 400)
    assert found.fitted
    exact = query @ key.mT
    error = ((query @ found.of_query) @ (key @ found.of_key).mT - exact).square().mean()
    first = ((query[..., :4]) @ (key[..., :4]).mT - exact).square().mean()
    assert float(error) < 0.1 * float(first)


def test_all_samples_are_what_as_many_as_there_are_tokens_are() -> None:
    query, key, *_ = tensors()
    query, key = query.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1)
    mean = means(query, key, torch.float32, centre=True)
    fits = [fit(which(rank=8), query, key, mean, samples) for samples in (0, 126, 65_536, 20)]
    for other in fits[1:3]:
        assert torch.equal(fits[0].of_query, other.of_query)
    assert not torch.allclose(fits[0].of_query, fits[3].of_query)


def test_samples_in_short_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, *_ = tensors()
    mean = means(query, key, torch.float32, centre=True)
    whole = fit(which(rank=8), query, key, mean, 100)
    monkeypatch.setattr(bases, "rows_at_a_time", lambda *sizes: 16)
    split = fit(which(rank=8), query, key, mean, 100)
    exact = query @ key.mT
    products = [(query @ b.of_query) @ (key @ b.of_key).mT for b in (whole, split)]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(products[0], exact, atol=0.1)


def test_the_settings_of_norms_reach_the_series() -> None:
    plain = attend().out
    changed = [attend(global_norm_power=0.5).out, attend(global_norm_clip=1.0).out]
    assert all(not torch.allclose(out, plain, atol=1e-4) for out in changed)
    assert torch.equal(attend(global_norm_clip=1000.0).out, plain)


def test_too_few_samples_keep_the_first_coordinates() -> None:
    query, key, *_ = tensors()
    few = fit(which(rank=8), query[:, :, :7], key[:, :, :7], none_taken(query, key), 64)
    assert not few.fitted
    assert torch.equal(query @ few.of_query, query[..., :8])
    assert fit(which(rank=8), query, key, none_taken(query, key), 7).fitted is False
    assert fit(which(rank=8), query, key, none_taken(query, key), 8).fitted


def test_a_fit_holds_for_its_layer_shapes_rank_and_dtype_in_one_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, *_ = tensors()
    fits: list[Key] = []

    def counted(key: Key, *rest: Any) -> Any:
        fits.append(key)
        return fit(key, *rest)

    monkeypatch.setattr(bases, "fit", counted)
    known = Bases()
    mean = none_taken(query, key)
    others = [
        which(), which("single.4"), which(rank=5), which(dtype=torch.bfloat16),
    ]  # fmt: skip
    for _ in range(3):
        for item in others:
            found = known.find(item, query, key, mean, 64, named=True)
            assert found.of_query.dtype == item.dtype
            assert found.of_query.shape == (1, 2, 16, item.rank)
    assert fits == others
    # A layer that nobody names could be any.
    for _ in range(2):
        known.find(which("None"), query, key, mean, 64, named=False)
    assert len(fits) == len(others) + 2


def test_too_few_samples_are_not_remembered() -> None:
    query, key, *_ = tensors()
    known, mean = Bases(), none_taken(query, key)
    item = which(rank=8)
    assert not known.find(item, query[:, :, :4], key[:, :, :4], mean, 64, named=True).fitted
    assert known.find(item, query, key, mean, 64, named=True).fitted


def test_each_run_fits_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[Key] = []

    def counted(key: Key, *rest: Any) -> Any:
        fits.append(key)
        return identity(key)

    monkeypatch.setattr(bases, "fit", counted)
    variant = HybridVariant()
    attend(variant, use_pca=False)
    assert not fits
    for _ in range(2):
        attend(variant, global_dim=4)
    assert len(fits) == 2, "what keeps the first coordinates is not remembered"
    variant.prepare(RunInfo(sigmas=()))
    attend(variant, global_dim=4)
    assert len(fits) == 3


def test_flops_count_what_is_near_and_the_features() -> None:
    shape = (1, 2, 1000, 16)

    def ratio(**settings: Any) -> float:
        chosen = HybridSettings(**settings)
        return HybridVariant.flops(shape, shape, chosen) / exact_flops(shape, shape)

    assert ratio(local_window=0, global_weight=0.0) == 1.0
    assert ratio(local_window=100, local_chunk=50, global_weight=0.0) == pytest.approx(0.25)
    text = ratio(local_window=100, local_chunk=50, global_weight=0.0, prefix_tokens=200)
    assert text == pytest.approx(0.2 + 0.8 * 0.45)
    assert ratio(local_window=100, global_dim=4) < ratio(local_window=100, global_dim=8)
