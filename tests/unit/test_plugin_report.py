"""The lines that sum up steps and runs in the log."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnscope.comfy_plugin.clocks import HostClock
from attnscope.comfy_plugin.recorder import CallRecord, ClosedStep, StepLog
from attnscope.comfy_plugin.report import RunReport, step_line
from attnscope.wire import RunEnded, StepClosed

RUN = "0" * 32
ORDER = ["double.0", "double.1", "single.0"]


def record(layer: str, **changes: Any) -> CallRecord:
    values: dict[str, Any] = {"made_by_variant": True, "kind": "", "reason": "", "detail": ""}
    values |= {"tokens_q": 96, "tokens_k": 96, "stats": {}}
    return CallRecord(layer=layer, **(values | changes))


def closed(*calls: Any, report: Any = None, step: int = 2) -> StepClosed:
    log = StepLog(step=step, sigma=0.5, revision=0, start=0.0, calls=list(calls), model_calls=1)
    return ClosedStep(RUN, "taylor", log, HostClock(), ORDER, report).build(step)


def calls() -> list[Any]:
    stats = {"nmse": 0.01, "nmse_eff": 0.002, "denom_min": 0.75, "denom_bad_frac": 0.0}
    stats |= {"qk_p01": -1.5, "qk_p99": 2.5, "q_norm": 4.0, "k_norm": 5.0}
    refused = {"head_dim": 256.0, "feature_dim": 9000.0, "probe_denom_min": -0.5}
    return [
        record(
            "double.0",
            stats={**stats, "head_dim": 64.0, "feature_dim": 2145.0, "sums_path": 20.0},
        ),
        record(
            "double.1",
            stats={**stats, "nmse": torch.tensor(0.5), "denom_min": 0.25, "sums_path": 2.0},
        ),
        record(
            "single.0", made_by_variant=False, kind="fallback", reason="denominator_probe",
            stats={**refused, "probe_bad_frac": 0.125},
        ),
        record("single.0", made_by_variant=False, kind="gate", reason="sigma_above_max"),
    ]  # fmt: skip


def test_a_step_in_one_line() -> None:
    assert step_line(closed(*calls()), 8) == (
        "step 3/8 sigma 0.5: worst NMSE 0.5 (double.1), eff 0.002 (double.0); "
        "denominators from 0.25, bad 0; probe from -0.5, bad 0.125; "
        "q·k -1.5 to 2.5, |q| 4 |k| 5; head_dim 256, R 9000; "
        "sums by full 1, torch (no CUDA device) 1; path taylor 2, exact 1; "
        "gated sigma_above_max 1; fell back denominator_probe 1"
    )


def test_what_was_not_measured_is_left_out() -> None:
    assert step_line(closed(record("double.0")), 0) == "step 3 sigma 0.5: path taylor 1"


def test_a_nan_is_the_worst() -> None:
    line = step_line(closed(record("double.0", stats={"nmse": math.nan, "nmse_eff": 0.1})), 0)
    assert "worst NMSE nan (double.0)" in line


def test_the_run_is_summed_up_at_its_end() -> None:
    lines: list[str] = []
    report = RunReport(2, lines.append)
    closed(*calls(), report=report.step, step=0)
    closed(record("double.0", stats={"nmse": 0.75}), report=report.step, step=1)
    report.end(RunEnded(run_id=RUN, seq=9, at=1.0, status="completed", duration_ms=2500.0))
    assert [line.split(":")[0] for line in lines] == [
        "step 1/2 sigma 0.5",
        "step 2/2 sigma 0.5",
        "run completed after 2 steps, 2.5 s",
    ]
    assert lines[-1].endswith(
        "3 of 5 calls ran the variant; worst NMSE 0.75 (double.0 at step 2); "
        "gated sigma_above_max 1; fell back denominator_probe 1"
    )


def test_a_report_that_fails_costs_no_step(caplog: pytest.LogCaptureFixture) -> None:
    def broken(step: StepClosed) -> None:
        raise ValueError("no")

    assert closed(record("double.0"), report=broken).step == 2
    assert "could not be summed up" in caplog.text
