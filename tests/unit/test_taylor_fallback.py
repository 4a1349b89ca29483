"""Early probe, same-call and deferred decisions, and how often a host waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.synchronisations import Synchronisations
from torch.utils.flop_counter import FlopCounterMode

from attnscope.attention.quality import sampled_indices
from attnscope.attention.reasons import Fallback
from attnscope.attention.samples import sample_call, statistics
from attnscope.attention.settings import TaylorSettings
from attnscope.attention.taylor.attend import Options, taylor_attention
from attnscope.attention.taylor.probe import least_denominator, probe_denominators
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.variant import Call, LayerId, Result

SCALE = 16**-0.5


def tensors(factor: float = 0.5, tokens: int = 50) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2, 2, tokens, 16, generator=generator).unbind(0)
    return q * factor, k, v


def call(step: int = 0, layer: int = 3, **settings: Any) -> Call:
    return Call(TaylorSettings(**settings), LayerId("single", layer), 0.5, step, SCALE)


BAD, GOOD = 6.0, 0.1


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(centre_keys=False, centre_queries=False),
        Options(sub_head_blocks=2),
        Options(sub_head_blocks=2, sub_head_mode="independent"),
        Options(feature_projection=8),
        Options(round_denominators=True),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_probe_sees_the_denominators_of_the_whole_call(options: Options, masked: bool) -> None:
    q, k, v = (t.double() for t in tensors(2.0))
    weights = (torch.arange(50) < 30).double()[None, None] if masked else None
    whole = taylor_attention(q, k, v, SCALE, 4, weights=weights, options=options).denominator
    some = probe_denominators(q, k, SCALE, 4, 7, weights=weights, options=options)
    rows = sampled_indices(50, 7, 0, q.device)
    torch.testing.assert_close(some, whole.index_select(2, rows))


def test_the_probe_goes_through_heads_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnscope.attention.taylor import kernel

    q, k, _ = tensors()
    whole = probe_denominators(q, k, SCALE, 4, 7)
    monkeypatch.setattr(kernel, "CPU_BUDGET", kernel.Budget(4 * 2**20, 2**28, 1))
    torch.testing.assert_close(probe_denominators(q, k, SCALE, 4, 7), whole)


def test_the_probe_takes_a_small_part_of_the_work() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 512, 64, generator=generator).unbind(0)

    def work(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    probed = work(lambda: probe_denominators(q, k, 64**-0.5, 4, 16))
    whole = work(lambda: taylor_attention(q, k, v, 64**-0.5, 4))
    assert 0 < probed < whole / 20


@pytest.mark.parametrize("terms", [1, 3, 5, 7])
def test_the_least_denominator_of_an_odd_number_of_terms_is_a_bound(terms: int) -> None:
    x = torch.linspace(-20.0, 20.0, 400_001, dtype=torch.float64)
    series = sum(x**p / torch.lgamma(torch.tensor(p + 1.0)).exp() for p in range(terms))
    least = float(torch.as_tensor(series).min())
    assert least - 1e-3 < least_denominator(terms, Options()) <= least + 1e-12
    shared = least_denominator(terms, Options(sub_head_blocks=3))
    assert shared == pytest.approx(1.0 - 3 * (1.0 - least_denominator(terms, Options())))
    independent = Options(sub_head_blocks=3, sub_head_mode="independent")
    assert least_denominator(terms, independent) == least_denominator(terms, Options())
    assert least_denominator(terms + 1, Options()) == float("-inf")


def test_a_bad_probe_falls_back_before_the_sums_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnscope.attention.taylor import variant

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the sums were made")

    monkeypatch.setattr(variant, "taylor_attention", never)
    result = TaylorVariant().attend(*tensors(BAD), call(P=4))
    assert result.out is None and result.fallback is Fallback.DENOMINATOR_PROBE
    assert float(result.stats["probe_bad_frac"]) > 0 > float(result.stats["probe_denom_min"])


def test_the_probe_respects_the_tolerated_share() -> None:
    tolerant = TaylorVariant().attend(*tensors(BAD), call(P=4, denom_fallback_frac_limit=1.0))
    share = float(tolerant.stats["probe_bad_frac"])
    assert tolerant.out is not None and 0 < share < 1
    strict = call(P=4, denom_fallback_frac_limit=share * 0.99)
    assert TaylorVariant().attend(*tensors(BAD), strict).fallback is Fallback.DENOMINATOR_PROBE


def test_a_probe_that_misses_what_is_bad_leaves_it_to_the_call() -> None:
    q, k, v = tensors(GOOD)
    rows = sampled_indices(50, 4, 0, q.device)
    spoilt = next(row for row in range(50) if row not in rows.tolist())
    q[:, :, spoilt] = float("nan")
    about = call(P=4, probe_samples=4, centre_queries=False)
    result = TaylorVariant().attend(q, k, v, about)
    assert result.fallback is Fallback.DENOMINATOR
    assert float(result.stats["probe_bad_frac"]) == 0.0 < float(result.stats["denom_bad_frac"])


@pytest.mark.parametrize(
    ("settings", "probed"),
    [
        ({"P": 3}, False),
        ({"P": 5}, False),
        ({"P": 4}, True),
        ({"P": 3, "eps": 0.9}, True),
        ({"P": 3, "sub_head_blocks": 4}, True),
        ({"P": 3, "sub_head_blocks": 4, "sub_head_mode": "independent"}, False),
        ({"P": 4, "early_probe": False}, False),
        ({"P": 4, "fallback_on_negative": False}, False),
    ],
)
def test_probing_is_left_out_where_no_denominator_can_be_bad(
    settings: dict[str, Any], probed: bool
) -> None:
    result = TaylorVariant().attend(*tensors(GOOD), call(**settings))
    assert ("probe_bad_frac" in result.stats) is probed


def test_a_deferred_layer_turns_exact_one_step_later_and_only_that_layer() -> None:
    variant, settings = TaylorVariant(), {"P": 4, "fallback_decision": "deferred"}
    keep = TaylorSettings(**settings)

    def attend(step: int, layer: int, factor: float) -> Result:
        about = Call(keep, LayerId("single", layer), 0.5, step, SCALE)
        return variant.attend(*tensors(factor), about)

    first = attend(0, 1, BAD)
    assert first.out is not None and bool(first.out.isfinite().all())
    assert float(first.stats["denom_bad_frac"]) > 0
    # The other condition's call in the same step decides as the first did.
    assert attend(0, 1, GOOD).out is not None
    assert attend(0, 2, GOOD).out is not None
    later = attend(1, 1, BAD)
    assert later.out is None and later.fallback is Fallback.DENOMINATOR_DEFERRED
    assert attend(1, 2, GOOD).out is not None
    # Its probe at step 1 was bad, at step 2 it is good: it comes back at step 3.
    assert attend(2, 1, GOOD).fallback is Fallback.DENOMINATOR_DEFERRED
    assert attend(3, 1, GOOD).out is not None


def test_without_a_probe_a_deferred_layer_stays_exact_until_settings_change() -> None:
    variant = TaylorVariant()
    base = {"P": 4, "fallback_decision": "deferred", "early_probe": False}
    keep, other = TaylorSettings(**base), TaylorSettings(**base, scale_mul=0.5)
    answers = []
    for step, settings in enumerate([keep, keep, keep, other, other]):
        factor = BAD if step == 0 else GOOD
        about = Call(settings, None, 0.5, step, SCALE)
        answers.append(variant.attend(*tensors(factor), about).fallback)
    deferred = Fallback.DENOMINATOR_DEFERRED
    assert answers == [None, deferred, deferred, None, None]


@pytest.mark.parametrize(
    ("settings", "factor", "waits"),
    [
        ({"P": 3}, GOOD, 1),
        ({"P": 4}, GOOD, 2),
        ({"P": 4}, BAD, 1),
        ({"P": 4, "early_probe": False}, GOOD, 1),
        ({"P": 4, "fallback_on_negative": False}, BAD, 0),
        ({"P": 4, "fallback_decision": "deferred"}, GOOD, 0),
        ({"P": 4, "fallback_decision": "deferred"}, BAD, 0),
        ({"P": 4, "fallback_decision": "deferred", "qk_norm_power": 0.5}, GOOD, 0),
        ({"P": 4, "fallback_decision": "deferred", "feature_projection": 8}, GOOD, 0),
        ({"P": 4, "fallback_decision": "deferred", "auto_tune": True}, GOOD, 0),
    ],
)
def test_how_often_a_call_waits_for_the_device(
    settings: dict[str, Any], factor: float, waits: int
) -> None:
    variant, keep = TaylorVariant(), TaylorSettings(**settings)
    q, k, v = tensors(factor)
    # The first step also fills caches of constants, which a run does once.
    for step in range(3):
        rows = sampled_indices(q.shape[2], 8, 0, q.device)
        about = Call(keep, LayerId("single", 3), 0.5, step, SCALE, log_mass_rows=rows)
        with Synchronisations() as seen:
            result = variant.attend(q, k, v, about)
            sample = sample_call(
                q, k, v, result.out, SCALE, None, 8, 0,
                effective=result.effective, log_mass=result.log_mass,
            )  # fmt: skip
            (stats,) = statistics([sample])
        assert "qk_std" in stats
    assert len(seen.waits) == waits, seen.waits


def test_the_count_sees_what_waits() -> None:
    x = torch.arange(6.0)
    with Synchronisations() as seen:
        float((x + 1).sum())
        assert bool((x + 1).max() > 2)
        (x + 1)[(x + 1) > 2]
        torch.nonzero(x + 1)
        (x + 1).tolist()
    scalar = "_local_scalar_dense"
    assert seen.waits[:2] == [scalar, scalar] and {"index", "nonzero"} <= set(seen.waits)
    done = x.sum()
    with Synchronisations() as seen:
        float(done)
    assert seen.waits == []


def test_half_precision_denominators_are_rounded_on_request() -> None:
    q, k, v = (t.to(torch.bfloat16) for t in tensors(1.0))
    exact = taylor_attention(q, k, v, SCALE, 4).denominator
    rounded = taylor_attention(q, k, v, SCALE, 4, options=Options(round_denominators=True))
    torch.testing.assert_close(
        rounded.denominator, exact.to(torch.bfloat16).float(), rtol=0.0, atol=0.0
    )
    assert not torch.equal(rounded.denominator, exact)
    variant = TaylorVariant()
    for denom_fp32, expected in ((True, exact), (False, rounded.denominator)):
        stats = variant.attend(q, k, v, call(P=4, eps=1e-9, denom_fp32=denom_fp32)).stats
        assert float(stats["denom_min"]) == float(expected.min())
