"""The search for shaping in a run's first steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnscope.attention.exact import reference_attention
from attnscope.attention.quality import nmse
from attnscope.attention.settings import TaylorSettings
from attnscope.attention.taylor import autotune
from attnscope.attention.taylor.autotune import candidates, looked_at
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.variant import Call, LayerId, RunInfo, Tuning

SCALE = 16**-0.5
LAYERS = [LayerId("double", i) for i in range(3)] + [LayerId("single", i) for i in range(6)]


def tensors(factor: float, tokens: int = 300) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 1, 2, tokens, 16, generator=generator).unbind(0)
    # A mean that is not taken out makes denominators of few terms bad, which shaping mends.
    return q * factor, k + 0.5, v


RAW: dict[str, Any] = {"P": 2, "centre_keys": False, "centre_queries": False}


def tuned_run(
    settings: TaylorSettings, steps: int = 3, factor: float = 4.0
) -> list[tuple[int, Tuning]]:
    """Steps of all layers; what was found, with the step that begins with it."""
    variant, found = TaylorVariant(), []
    variant.prepare(RunInfo(sigmas=(1.0,) * (steps + 1), layers=LAYERS))
    for step in range(steps):
        tuning = variant.retune(settings)
        if tuning is not None:
            found.append((step, tuning))
            assert isinstance(tuning.settings, TaylorSettings)
            settings = tuning.settings
        for layer in LAYERS:
            variant.attend(*tensors(factor), Call(settings, layer, 0.5, step, SCALE))
    return found


def test_candidates_follow_the_seed_and_the_ranges() -> None:
    base = TaylorSettings(
        auto_tune=True, auto_tune_candidates=64, qk_norm_power=0.9, auto_tune_clip_max=9.0
    )
    tried = candidates(base)
    assert tried == candidates(base) and len(tried) == 65
    assert tried[0] == base
    assert candidates(base.model_copy(update={"auto_tune_seed": 1})) != tried
    for one in tried[1:]:
        assert TaylorSettings.model_validate(one.model_dump()) == one
        assert one.qk_norm_power == 0.0 or 0.2 <= one.qk_norm_power <= 0.7
        assert one.qk_norm_clip == 0.0 or 8.0 <= one.qk_norm_clip <= 9.0
        assert 0.8 <= one.scale_mul <= 1.0
    kinds = {(one.qk_norm_power > 0, one.qk_norm_clip > 0) for one in tried[1:]}
    assert len(kinds) == 4


def test_the_best_candidate_is_locked_in_after_the_steps() -> None:
    settings = TaylorSettings(
        auto_tune=True,
        auto_tune_steps=2,
        auto_tune_candidates=12,
        fallback_on_negative=False,
        **RAW,
    )
    found = tuned_run(settings, steps=5)
    assert [step for step, _ in found] == [2]
    tuning = found[0][1]
    assert tuning.score_after < tuning.score_before
    assert "12 candidates" in tuning.detail and "2 steps" in tuning.detail
    # It is what raw quality on the whole call says as well.
    q, k, v = tensors(4.0)
    exact = reference_attention(q, k, v, SCALE)

    def error(one: Any) -> float:
        out = TaylorVariant().attend(q, k, v, Call(one, None, 0.5, 0, SCALE)).out
        return float("inf") if out is None else float(nmse(out, exact))

    assert error(tuning.settings) == min(error(one) for one in candidates(settings))
    assert tuning.score_before == pytest.approx(error(settings), rel=1e-3)


def test_settings_that_no_candidate_beats_are_kept_and_reported() -> None:
    found = tuned_run(TaylorSettings(auto_tune=True, P=5), factor=0.05)
    tuning = found[0][1]
    assert tuning.settings == TaylorSettings(auto_tune=True, P=5)
    assert tuning.score_after == tuning.score_before


def test_a_candidate_that_does_not_fall_back_goes_before_one_that_does() -> None:
    settings = TaylorSettings(
        auto_tune=True, auto_tune_candidates=32, auto_tune_scale_min=0.05, **RAW
    )
    tuning = tuned_run(settings)[0][1]
    q, k, v = tensors(4.0)
    call = Call(settings, None, 0.5, 0, SCALE)
    assert TaylorVariant().attend(q, k, v, call).out is None
    call = Call(tuning.settings, None, 0.5, 0, SCALE)
    assert TaylorVariant().attend(q, k, v, call).out is not None
    assert "100% → 0%" in tuning.detail


def test_steps_at_which_nothing_is_due_do_not_count() -> None:
    variant = TaylorVariant()
    settings = TaylorSettings(auto_tune=True)
    for _ in range(3):
        assert variant.retune(settings) is None
    variant.attend(*tensors(1.0), Call(settings, None, 0.5, 3, SCALE))
    assert variant.retune(settings) is not None


def test_switching_off_and_on_tunes_anew() -> None:
    variant = TaylorVariant()
    on, off = TaylorSettings(auto_tune=True), TaylorSettings()
    for settings, expected in [(on, True), (on, False), (off, False), (on, True)]:
        variant.attend(*tensors(1.0), Call(settings, None, 0.5, 0, SCALE))
        assert (variant.retune(settings) is not None) is expected


def test_changed_settings_begin_the_search_again() -> None:
    variant = TaylorVariant()
    first, second = TaylorSettings(auto_tune=True), TaylorSettings(auto_tune=True, P=5)
    variant.attend(*tensors(1.0), Call(first, None, 0.5, 0, SCALE))
    assert variant.retune(second) is None
    variant.attend(*tensors(1.0), Call(second, None, 0.5, 1, SCALE))
    tuning = variant.retune(second)
    assert tuning is not None and tuning.settings.P == 5  # type: ignore[attr-defined]


def test_calls_are_spread_over_the_layers_that_the_gates_let_through() -> None:
    settings = TaylorSettings(auto_tune_samples=3)
    assert looked_at(LAYERS, settings) == {"double.0", "single.0", "single.3"}
    only = TaylorSettings(auto_tune_samples=3, taylor_block_type="single", taylor_layer_start=4)
    assert looked_at(LAYERS, only) == {"single.4", "single.5"}
    assert looked_at([], settings) is None


def test_the_samples_bound_the_calls_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    original = autotune.exact_rows

    def exact_rows(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> Any:
        scored.append((query.shape[2], key.shape[2]))
        return original(query, key, *rest)

    monkeypatch.setattr(autotune, "exact_rows", exact_rows)
    tuned_run(
        TaylorSettings(
            auto_tune=True, auto_tune_steps=2, auto_tune_samples=4, auto_tune_max_tokens=100
        ),
        steps=4,
    )
    assert scored == [(100, 100)] * 8


@pytest.mark.parametrize("form", ["boolean", "additive", "expanded"])
def test_a_key_mask_is_respected_on_the_sampled_tokens(form: str) -> None:
    q, k, v = tensors(0.3)
    keep = torch.arange(300) < 120
    mask = keep[None, None, None, :]
    if form == "additive":
        mask = torch.where(mask, 0.0, float("-inf"))
    if form == "expanded":
        mask = mask.expand(1, 2, 300, 300)
    k = torch.where(keep[:, None], k, torch.full_like(k, 50.0))
    settings = TaylorSettings(auto_tune=True, P=7)
    variant = TaylorVariant()
    variant.attend(q, k, v, Call(settings, None, 0.5, 0, SCALE, mask))
    tuning = variant.retune(settings)
    assert tuning is not None and tuning.score_before < 1e-3


@pytest.mark.parametrize("name", ["power", "clip", "scale"])
def test_a_range_must_not_end_before_it_begins(name: str) -> None:
    least, greatest = f"auto_tune_{name}_min", f"auto_tune_{name}_max"
    with pytest.raises(ValueError, match=rf"{greatest}: is 0.3; allowed: {least} or more"):
        TaylorSettings.model_validate({least: 0.5, greatest: 0.3})
