"""What keeps Taylor attention from a call, and what it tunes, seen in the page of a live run."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from support.stack import Stack, demo_workflow, wait_for

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]

STEPS = 30


def reasons_of(stack: Stack, run_id: str) -> dict[str, list[dict[str, Any]]]:
    """The run's gates and fallbacks by reason."""
    found: dict[str, list[dict[str, Any]]] = {}
    for item in stack.api(f"/runs/{run_id}/fallbacks")["items"]:
        found.setdefault(item["reason"], []).append(item)
    return found


def test_tuning_gates_and_bad_denominators_are_seen_with_their_reasons(
    page: Page, stack: Stack
) -> None:
    earlier = len(log_of(stack))
    prompt = stack.queue(
        demo_workflow(
            steps=STEPS,
            settings={
                "min_tokens": 0,
                "taylor_sigma_max": 0.9,
                "taylor_layer_start": 1,
                "auto_tune": True,
                "auto_tune_candidates": 4,
                "quality_every": 1,
                "auto_tune_max_tokens": 128,
            },
        )
    )
    run_id = stack.run_of(prompt)["run_id"]
    page.goto(f"{stack.server_url}/runs/{run_id}")
    expect(page.get_by_test_id("heatmap")).to_be_visible(timeout=20_000)

    # Both gates hold from the start; the page names each with its reason.
    for reason, prose in (
        ("sigma_above_max", "sigma lies above"),
        ("layer_outside_range", "outside the layer range"),
    ):
        row = page.get_by_test_id(f"reason-{reason}")
        expect(row).to_contain_text(prose, timeout=90_000)
        expect(row).to_contain_text("gate")

    # The tuned settings are a revision with its badge, and in force.
    tuned = page.get_by_test_id("revision-1")
    expect(tuned).to_have_attribute("data-state", "applied", timeout=90_000)
    expect(page.get_by_test_id("tuned-1")).to_have_text("tuned")
    expect(tuned).to_contain_text(re.compile(r"mean NMSE .* → .*; 4 candidates"))
    expect(tuned).to_contain_text("in force")
    tuned_step = int(tuned.get_attribute("data-applied-step") or -1)

    # Denominators are made bad from the page, while it samples.
    toggle = page.get_by_test_id("advanced-stability")
    if toggle.get_attribute("aria-expanded") != "true":
        toggle.click()
    # The mean of two terms is about 1 and its half below: so high an eps finds that bad.
    for name, value in (("P", "2"), ("eps", "1")):
        field = page.locator(f'[data-testid="field-{name}"] input:not([type=range])')
        field.first.fill(value)
    page.get_by_test_id("apply-settings").click()
    forced = page.get_by_test_id("revision-2")
    expect(forced).to_have_attribute("data-state", "applied", timeout=60_000)
    forced_step = int(forced.get_attribute("data-applied-step") or -1)
    row = page.get_by_test_id("reason-denominator_probe")
    expect(row).to_contain_text("early probe", timeout=60_000)
    expect(row).to_contain_text("fallback")

    run = stack.ended_run(prompt)
    assert run["status"] == "completed" and run["settings"]["eps"] == 1.0
    found = reasons_of(stack, run_id)
    sigmas = run["sampling"]["sigmas"]
    assert {item["step"] for item in found["sigma_above_max"]} == {
        step for step in range(STEPS) if sigmas[step] > 0.9
    }
    assert {item["layer"] for item in found["layer_outside_range"]} == {
        layer for layer in run["layers"] if layer.endswith(".0")
    }
    assert min(item["step"] for item in found["denominator_probe"]) == forced_step

    revisions = {item["number"]: item for item in stack.api(f"/runs/{run_id}/revisions")["items"]}
    assert [revisions[n]["tuned"] for n in (0, 1, 2)] == [False, True, False]
    # The step after the first one that was due, and what the user changed kept what was tuned.
    assert tuned_step == next(step for step in range(STEPS) if sigmas[step] <= 0.9) + 1
    for name in ("qk_norm_power", "qk_norm_clip", "scale_mul"):
        assert revisions[2]["settings"][name] == revisions[1]["settings"][name]
    rows = stack.sql(
        "SELECT DISTINCT step, revision FROM layer_steps_readable WHERE run_id = ?", run_id
    )
    for row_ in rows:
        expected = 0 if row_["step"] < tuned_step else 1 if row_["step"] < forced_step else 2
        assert row_["revision"] == expected, dict(row_)
    made = stack.sql(
        "SELECT step, layer, nmse, nmse_eff, feature_dim, head_dim, sums_path "
        "FROM layer_steps_readable WHERE run_id = ? AND calls_variant > 0",
        run_id,
    )
    assert made and all(None not in tuple(one) for one in made)

    # What computed the sums of a layer, and why nothing better.
    cell = made[0]
    infos = {one["name"]: one for one in stack.api("/schema/metrics")["metrics"]}
    code = int(cell["sums_path"])
    page.goto(f"{stack.server_url}/runs/{run_id}?layer={cell['layer']}&step={cell['step']}")
    expect(page.get_by_test_id("cell-readout")).to_contain_text(
        f"{infos['sums_path']['title']} {infos['sums_path']['names'][str(code)]}"
    )

    # ComfyUI's log sums up every step and the run, once each.
    wait_for(
        lambda: "run completed after" in log_of(stack)[earlier:], 30, "the run's line in the log"
    )
    logged = log_of(stack)[earlier:].splitlines()
    lines = [line for line in logged if "AttnScope taylor: step " in line]
    assert len(lines) == STEPS
    assert any("fell back denominator_probe" in line for line in lines)
    assert any("worst NMSE" in line and "eff" in line and ", R " in line for line in lines)


def log_of(stack: Stack) -> str:
    """What ComfyUI has logged so far."""
    return (stack.folder / "comfyui.log").read_text(encoding="utf-8", errors="replace")
