"""From call records to a step's message."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnscope.attention.metrics import BY_NAME, Fold
from attnscope.attention.sums_paths import SumsPath
from attnscope.comfy_plugin.clocks import HostClock, clock_for
from attnscope.comfy_plugin.recorder import CallRecord, ClosedStep, StepLog, fold
from attnscope.wire import StepClosed

RUN = "0" * 32
ORDER = ["double.0", "double.1", "single.0"]


def record(layer: str, **changes: Any) -> CallRecord:
    values: dict[str, Any] = {
        "layer": layer,
        "made_by_variant": True,
        "kind": "",
        "reason": "",
        "detail": "",
        "tokens_q": 96,
        "tokens_k": 96,
        "stats": {},
    }
    return CallRecord(**(values | changes))


def close(*calls: CallRecord, order: list[str] = ORDER, **changes: Any) -> StepClosed:
    values: dict[str, Any] = {"step": 2, "sigma": 0.5, "revision": 1, "start": 10.0}
    log = StepLog(**(values | changes), calls=list(calls), model_calls=1)
    step = ClosedStep(RUN, "taylor", log, HostClock(), order)
    assert step.ready()
    return StepClosed.model_validate_json(step.build(5).model_dump_json())


def test_calls_of_a_layer_are_folded_by_each_metric_s_rule() -> None:
    event = close(
        record("single.0", stats={"nmse": torch.tensor(0.25), "denom_min": 0.5, "qk_p99": 3.0}),
        record("single.0", stats={"nmse": torch.tensor(0.75), "denom_min": 0.25, "qk_p99": 2.0}),
        record("double.0", stats={"denom_bad_frac": torch.tensor(0.5, dtype=torch.float64)}),
    )
    columns = event.layers
    assert columns.layer == ["double.0", "single.0"]
    assert columns.metrics["nmse"] == [None, 0.5]
    assert columns.metrics["denom_min"] == [None, 0.25]
    assert columns.metrics["qk_p99"] == [None, 3.0]
    assert columns.metrics["denom_bad_frac"] == [0.5, None]
    assert columns.calls == [1, 2]
    assert event.seq == 5 and event.step == 2 and event.revision == 1


def test_the_least_path_of_a_layer_s_calls_is_reported_with_its_reason() -> None:
    codes = [float(code) for code in (SumsPath.FULL, SumsPath.STREAMING_TERMS)]
    event = close(
        *(record("double.0", stats={"sums_path": code}) for code in codes), record("double.1")
    )
    assert event.layers.metrics["sums_path"] == [float(SumsPath.STREAMING_TERMS), None]
    text = BY_NAME["sums_path"].text
    assert text(11.0) == "streaming (P is too high for the full path)"
    assert (text(7.0), text(math.nan), text(2.5)) == ("7", "nan", "2.5")


def test_time_adds_up() -> None:
    event = close(
        record("double.0", start=1.0, end=1.002), record("double.0", start=1.5, end=1.501)
    )
    assert event.layers.metrics["attn_ms"] == [pytest.approx(3.0)]
    assert event.duration_ms > 0


def test_paths_and_reasons() -> None:
    event = close(
        record("double.0"),
        record("double.0", made_by_variant=False, kind="fallback", reason="denominator"),
        record("double.1", made_by_variant=False, kind="gate", reason="disabled"),
        record(
            "double.1", made_by_variant=False, kind="fallback", reason="feature_dim", detail="R 9"
        ),
        record("double.1", made_by_variant=False, kind="fallback", reason="feature_dim"),
        record("single.0"),
    )
    columns = event.layers
    assert columns.path == ["mixed", "exact", "taylor"]
    assert columns.calls_variant == [1, 0, 1]
    assert columns.calls_gated == [0, 1, 0]
    assert columns.calls_fallback == [1, 2, 0]
    reasons = {(r.layer, r.kind, r.reason): (r.count, r.detail) for r in event.reasons}
    assert reasons == {
        ("double.0", "fallback", "denominator"): (1, ""),
        ("double.1", "gate", "disabled"): (1, ""),
        ("double.1", "fallback", "feature_dim"): (2, "R 9"),
    }


def test_non_finite_numbers_survive_the_wire() -> None:
    event = close(
        record("double.0", stats={"nmse": float("nan")}),
        record("double.1", stats={"nmse": torch.tensor(float("inf"))}),
        sigma=None,
    )
    first, second = event.layers.metrics["nmse"]
    assert first is not None and math.isnan(first)
    assert second == math.inf
    assert math.isnan(event.sigma)


@pytest.mark.parametrize("how", list(Fold))
def test_a_nan_among_the_calls_stays_one(how: Fold) -> None:
    assert math.isnan(fold(how, [1.0, math.nan, 3.0]))
    assert math.isnan(fold(how, [math.nan, 1.0]))


def test_infinities_are_folded_like_numbers() -> None:
    assert fold(Fold.MEAN, [math.inf, 1.0]) == math.inf
    assert math.isnan(fold(Fold.SUM, [math.inf, -math.inf]))


def test_layers_stand_in_the_model_s_order_and_others_behind() -> None:
    event = close(record("unknown.0"), record("single.0"), record("double.1"))
    assert event.layers.layer == ["double.1", "single.0", "unknown.0"]


def test_metrics_that_nobody_knows_are_left_out() -> None:
    assert close(record("double.0", stats={"mood": 1.0})).layers.metrics == {}


def test_a_cpu_is_timed_by_the_host() -> None:
    assert clock_for(torch.device("cpu")).measures_calls
    assert not clock_for(torch.device("meta")).measures_calls
