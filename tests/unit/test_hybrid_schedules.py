"""How window and weight follow sigma."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnscope.attention.hybrid.schedules import global_weight, local_window, smoothstep
from attnscope.attention.settings import HybridSettings

SIGMAS = st.floats(0.0, 2.0)


def scheduled(least: int = 512, most: int = 0) -> HybridSettings:
    return HybridSettings(
        local_window=300, local_window_min=least, local_window_max=most,
        local_window_sigma_low=0.2, local_window_sigma_high=0.8,
    )  # fmt: skip


def test_without_a_schedule_the_window_is_the_setting() -> None:
    assert local_window(HybridSettings(local_window=300), 0.7, 4096) == 300
    assert local_window(HybridSettings(local_window=300), None, 4096) == 300
    assert local_window(scheduled(), None, 4096) == 300


def test_zero_is_all_tokens_of_the_current_length() -> None:
    for tokens in (1024, 4608):
        assert local_window(HybridSettings(local_window=0), 0.5, tokens) == tokens
        assert local_window(scheduled(512, 0), 0.9, tokens) == tokens
        assert local_window(scheduled(0, 0), 0.1, tokens) == tokens
        # Half-way is the middle between the least and all tokens of this length.
        assert local_window(scheduled(512, 0), 0.5, tokens) == (512 + tokens) / 2


def test_a_window_is_no_longer_than_the_sequence() -> None:
    assert local_window(HybridSettings(local_window=5000), None, 100) == 100


def test_the_window_is_level_at_both_ends_of_its_schedule() -> None:
    settings = scheduled(100, 1100)
    assert [local_window(settings, sigma, 4096) for sigma in (0.0, 0.2, 0.8, 1.0)] == [
        100, 100, 1100, 1100,
    ]  # fmt: skip
    # x²(3 - 2x) at a quarter of the way: 0.15625.
    assert local_window(settings, 0.35, 4096) == round(100 + 1000 * 0.15625)
    near_end = local_window(settings, 0.215, 4096) - 100
    middle = local_window(settings, 0.515, 4096) - local_window(settings, 0.5, 4096)
    assert near_end * 10 < middle


@given(SIGMAS, SIGMAS)
def test_the_window_grows_and_the_weight_falls_with_sigma(first: float, second: float) -> None:
    low, high = sorted((first, second))
    window = scheduled(100, 1100)
    assert local_window(window, low, 4096) <= local_window(window, high, 4096)
    ramp = HybridSettings(global_weight=0.6, global_sigma_low=0.3, global_sigma_high=0.9)
    assert global_weight(ramp, low) >= global_weight(ramp, high)


def test_the_weight_is_full_at_low_sigma_and_zero_at_high_sigma() -> None:
    ramp = HybridSettings(global_weight=0.6, global_sigma_low=0.2, global_sigma_high=0.8)
    weights = [global_weight(ramp, sigma) for sigma in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert weights == pytest.approx([0.6, 0.6, 0.3, 0.0, 0.0])
    assert global_weight(ramp, None) == 0.6
    assert global_weight(HybridSettings(global_weight=0.6), 1.0) == 0.6


def test_a_float32_sigma_typed_as_an_end_is_that_end() -> None:
    ramp = HybridSettings(global_weight=1.0, global_sigma_low=0.2, global_sigma_high=0.7)
    assert global_weight(ramp, 0.699999988079071) == 0.0
    assert global_weight(ramp, 0.20000000298023224) == 1.0


@given(st.floats(-1.0, 2.0))
def test_smoothstep_stays_between_its_ends_and_is_symmetric(share: float) -> None:
    assert 0.0 <= smoothstep(share) <= 1.0
    assert smoothstep(share) + smoothstep(1.0 - share) == pytest.approx(1.0)


def test_a_greatest_window_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="local_window_max: is 100; allowed: 0 for all tokens"):
        HybridSettings(local_window_min=512, local_window_max=100)
    with pytest.raises(ValueError, match="which is all tokens"):
        HybridSettings(local_window_min=0, local_window_max=100)


def test_schedules_need_no_torch() -> None:
    code = "import sys, attnscope.attention.hybrid.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
