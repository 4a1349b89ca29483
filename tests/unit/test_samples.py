"""Statistics of calls against their definitions in float64, and what they launch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synchronisations import Synchronisations

from attnscope.attention import metrics, samples
from attnscope.attention.exact import reference_attention
from attnscope.attention.quality import cosine, nmse, sampled_indices
from attnscope.attention.samples import CallSample, sample_call, statistics
from attnscope.attention.settings import TaylorSettings
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.variant import Call, Effective, LayerId
from attnscope.comfy_plugin import pool
from attnscope.comfy_plugin.pool import SamplePool

SCALE = 0.25


def tensors(tokens: int = 64, seed: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(3, 2, 2, tokens, 16, generator=generator, dtype=torch.float64).unbind(0)
    )


def measured(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    (stats,) = statistics([sample_call(*args, **kwargs)])
    return stats


def nearest_rank(values: torch.Tensor, share: float) -> float:
    ordered = values.flatten().sort().values
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def test_all_queries_and_keys_sampled_give_the_full_metrics() -> None:
    # So few that the percentiles look at every logit too.
    q, k, v = tensors(16)
    exact = reference_attention(q, k, v, SCALE)
    out = exact + 0.1 * torch.randn_like(exact)
    stats = measured(q, k, v, out, SCALE, None, 16, 0)
    logits = q @ k.transpose(-2, -1) * SCALE
    expected = {
        "nmse": (out - exact).square().sum() / exact.square().sum(),
        "cosine": torch.nn.functional.cosine_similarity(out, exact, dim=-1).mean(),
        "qk_std": (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt(),
        "qk_p01": nearest_rank(logits, 0.01),
        "qk_p50": nearest_rank(logits, 0.5),
        "qk_p99": nearest_rank(logits, 0.99),
        "q_norm": q.norm(dim=-1).mean(),
        "k_norm": k.norm(dim=-1).mean(),
    }
    expected["nmse_eff"], expected["cosine_eff"] = expected["nmse"], expected["cosine"]
    assert set(stats) == set(expected) <= set(metrics.METRIC_NAMES)
    for name, value in expected.items():
        assert stats[name].dtype == torch.float32 and stats[name].ndim == 0
        assert float(stats[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def test_few_samples_come_near_the_full_metrics() -> None:
    q, k, v = tensors(512)
    exact = reference_attention(q, k, v, SCALE)
    noise = torch.Generator().manual_seed(1)
    out = exact + 0.1 * torch.randn(exact.shape, dtype=exact.dtype, generator=noise)
    logits = q @ k.transpose(-2, -1) * SCALE
    stats = measured(q, k, v, out, SCALE, None, 64, 0)
    assert float(stats["nmse"]) == pytest.approx(float(nmse(out, exact)), rel=0.25)
    assert float(stats["cosine"]) == pytest.approx(float(cosine(out, exact)), abs=0.05)
    assert float(stats["qk_std"]) == pytest.approx(
        float((logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()), rel=0.1
    )
    assert float(stats["qk_p99"]) == pytest.approx(nearest_rank(logits, 0.99), rel=0.2)


def test_the_variance_of_few_keys_is_unbiased() -> None:
    q, k, _ = tensors(400)
    logits = q @ k.transpose(-2, -1) * SCALE
    whole = (logits - logits.mean(-1, keepdim=True)).square().mean()
    found, dividing_by_all = [], []
    for seed in range(300):
        sample = sample_call(q, k, k, None, SCALE, None, 400, seed)
        few = CallSample(sample.query, sample.key[:, :, :4], SCALE, None, every_key=False)
        found.append(float(statistics([few])[0]["qk_std"]) ** 2)
        dividing_by_all.append(found[-1] * 3 / 4)
    assert sum(found) / 300 == pytest.approx(float(whole), rel=0.03)
    assert sum(dividing_by_all) / 300 < 0.8 * float(whole)


def test_exact_output_leaves_out_what_it_can_not_have() -> None:
    q, k, v = tensors()
    stats = measured(q, k, v, None, SCALE, None, 8, 0)
    assert "nmse" not in stats and "qk_std" in stats


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_masked_pairs_count_neither_in_quality_nor_in_statistics(
    rows: bool, additive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors()
    mask = (torch.arange(64) < 20)[None, None, None, :]
    exact = reference_attention(q, k, v, SCALE, mask)
    live = (q @ k.transpose(-2, -1) * SCALE)[..., :20]
    k = k.clone()
    k[:, :, 20:] *= 1000
    if rows:
        mask = mask.expand(1, 1, 64, 64).contiguous()
    if additive:
        mask = torch.where(mask, 0.0, float("-inf"))
    monkeypatch.setattr(samples, "_PERCENTILE_VALUES", 2**20)
    stats = measured(q, k, v, exact, SCALE, mask, 16, 0)
    assert float(stats["nmse"]) < 1e-10
    chosen = live.index_select(2, sampled_indices(64, 16, 0, q.device))
    for name, share in (("qk_p01", 0.01), ("qk_p50", 0.5), ("qk_p99", 0.99)):
        assert float(stats[name]) == pytest.approx(nearest_rank(chosen, share), abs=1e-5)
    centred = chosen - chosen.mean(-1, keepdim=True)
    assert float(stats["qk_std"]) == pytest.approx(float(centred.square().mean().sqrt()), rel=1e-4)


def test_a_mask_that_hides_everything_leaves_no_spread() -> None:
    q, k, v = tensors()
    nothing = torch.zeros(1, 1, 1, 64, dtype=torch.bool)
    stats = measured(q, k, v, None, SCALE, nothing, 16, 0)
    assert all(math.isnan(float(stats[name])) for name in ("qk_std", "qk_p01", "qk_p50", "qk_p99"))


def test_nan_shows_in_the_metrics() -> None:
    q, k, v = tensors()
    out = reference_attention(q, k, v, SCALE)
    out[0, 0] = float("nan")
    assert torch.isnan(measured(q, k, v, out, SCALE, None, 16, 0)["nmse"])
    q = q.clone()
    q[0, 0] = float("nan")
    for mask in (None, (torch.arange(64) < 20)[None, None, None]):
        stats = measured(q, k, v, None, SCALE, mask, 16, 0)
        for name in ("qk_std", "qk_p01", "qk_p50", "qk_p99", "q_norm"):
            assert torch.isnan(stats[name]), name
        assert torch.isfinite(stats["k_norm"])


def test_effective_quality_is_against_the_attention_that_was_approximated() -> None:
    q, k, v = tensors()
    soft = Effective(q * 0.5, k, SCALE * 0.7)
    out = reference_attention(soft.query, soft.key, v, soft.scale)
    rows = sampled_indices(64, 16, 0, q.device)
    mass = (soft.query @ k.transpose(-2, -1) * soft.scale).logsumexp(-1).index_select(2, rows)
    stats = measured(q, k, v, out, SCALE, None, 16, 0, effective=soft, log_mass=mass + 0.25)
    assert float(stats["nmse_eff"]) < 1e-10 < 1e-4 < float(stats["nmse"])
    assert float(stats["cosine_eff"]) > 1 - 1e-6 > float(stats["cosine"])
    assert float(stats["log_mass_bias"]) == pytest.approx(0.25, abs=1e-5)
    # The statistics of q and k are those of the call, not of what was shaped.
    assert torch.equal(stats["q_norm"], measured(q, k, v, None, SCALE, None, 16, 0)["q_norm"])


def test_without_shaping_there_is_one_quality() -> None:
    q, k, v = tensors()
    sample = sample_call(q, k, v, v, SCALE, None, 16, 0)
    (stats,) = statistics([sample])
    assert sample.effective is None
    assert stats["nmse_eff"] == stats["nmse"] and stats["cosine_eff"] == stats["cosine"]


def test_raw_and_effective_quality_look_at_the_same_queries() -> None:
    q, k, v = tensors()
    sample = sample_call(q, k, v, v, SCALE, None, 5, 3, effective=Effective(q, k, SCALE))
    assert sample.exact is not None and sample.effective is not None
    assert torch.equal(sample.exact, sample.effective) and sample.exact.shape[2] == 5


@given(
    st.lists(st.tuples(st.sampled_from([20, 40]), st.booleans(), st.booleans()), max_size=6),
    st.integers(1, 9),
)
@settings(max_examples=30, deadline=None)
def test_calls_come_out_the_same_whatever_they_are_computed_with(
    calls: list[tuple[int, bool, bool]], queries: int
) -> None:
    taken = []
    for seed, (tokens, masked, approximated) in enumerate(calls):
        q, k, v = tensors(tokens, seed)
        mask = (torch.arange(tokens) % 3 > 0)[None, None, None] if masked else None
        out = v if approximated else None
        taken.append(sample_call(q, k, v, out, SCALE, mask, queries, 0))
    for sample, together in zip(taken, statistics(taken), strict=True):
        (alone,) = statistics([sample])
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, equal_nan=True)


def test_many_heads_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(512)
    some = measured(q, k, v, None, SCALE, None, 64, 0)
    monkeypatch.setattr(samples, "_PERCENTILE_VALUES", 2**20)
    every = measured(q, k, v, None, SCALE, None, 64, 0)
    for name in ("qk_p01", "qk_p50", "qk_p99"):
        assert float(some[name]) == pytest.approx(float(every[name]), abs=0.2)


def test_a_pool_computes_in_parts_rather_than_hold_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = tensors()
    held = SamplePool()
    told: list[dict[str, Any]] = [{"head_dim": 16.0} for _ in range(5)]
    sample = sample_call(q, k, v, v, SCALE, None, 8, 0)
    monkeypatch.setattr(pool, "MOST_VALUES", 2 * sample.values)
    for stats in told:
        held.add(sample, stats)
    assert ["nmse" in stats for stats in told] == [True, True, True, False, False]
    held.settle()
    assert all(stats["nmse"] == told[0]["nmse"] and "head_dim" in stats for stats in told)


def test_statistics_that_fail_leave_the_rest_of_a_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(held: Any) -> Any:
        raise RuntimeError("no statistics today")

    monkeypatch.setattr(pool, "statistics", broken)
    q, k, v = tensors()
    held, stats = SamplePool(), {"head_dim": 16.0}
    held.add(sample_call(q, k, v, None, SCALE, None, 8, 0), stats)
    held.settle()
    assert stats == {"head_dim": 16.0}
    assert "no statistics today" in caplog.text


MOST_LAUNCHES = {"exact": 2, "approximated": 11, "shaped": 21}
"""Operators of a call's sample in float32; every one more slows every call of every sampling."""

MOST_LAUNCHES_OF_A_STEP = {"exact": 17, "approximated": 37, "shaped": 58}
"""Whatever the number of calls in it."""


@pytest.mark.parametrize("kind", list(MOST_LAUNCHES))
def test_what_a_measured_call_and_a_step_launch_and_that_none_waits(kind: str) -> None:
    q, k, v = (tensor.float() for tensor in tensors(100))
    given_: dict[str, Any] = {}
    if kind == "shaped":
        given_ = {"effective": Effective(q, k, 0.2), "log_mass": torch.zeros(2, 2, 16)}
    out = None if kind == "exact" else v

    def take() -> CallSample:
        return sample_call(q, k, v, out, SCALE, None, 16, 0, **given_)

    statistics([take()])
    with Synchronisations() as seen:
        sample = take()
    assert seen.waits == []
    assert len(seen.launches) <= MOST_LAUNCHES[kind], seen.launches
    counts = []
    for calls in (1, 57):
        with Synchronisations() as seen:
            statistics([sample] * calls)
        assert seen.waits == []
        counts.append(len(seen.launches))
    assert counts[0] == counts[1] <= MOST_LAUNCHES_OF_A_STEP[kind], seen.launches


def test_what_the_log_mass_launches_and_that_it_does_not_wait() -> None:
    q, k, v = (tensor.float() * 0.3 for tensor in tensors(100))
    rows = sampled_indices(100, 16, 0, q.device)
    chosen, variant = TaylorSettings(fallback_on_negative=False), TaylorVariant()
    launches = []
    for wanted in (None, rows):
        about = Call(chosen, LayerId("single", 0), 0.5, 0, SCALE, log_mass_rows=wanted)
        variant.attend(q, k, v, about)
        with Synchronisations() as seen:
            variant.attend(q, k, v, about)
        assert seen.waits == []
        launches.append(len(seen.launches))
    assert 0 < launches[1] - launches[0] <= 12
