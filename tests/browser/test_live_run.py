"""A run watched and steered from the page: ComfyUI, server and Chromium, all real."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, Page, expect
from support.stack import Stack, demo_workflow, wait_for

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]

STEPS = 30
LOWERED = 0.4


def number(locator: Locator, attribute: str) -> int:
    """An element's attribute as a whole number; -1 where it has none yet."""
    text = locator.get_attribute(attribute)
    return int(text) if text else -1


def open_run(page: Page, stack: Stack, run_id: str) -> Locator:
    """From the list of runs into one of them, by a click; its heatmap."""
    page.goto(stack.server_url)
    page.locator(f'[data-testid="run-row"][data-run="{run_id}"] a').first.click()
    expect(page).to_have_url(re.compile(rf"/runs/{run_id}"))
    heatmap = page.get_by_test_id("heatmap")
    expect(heatmap).to_be_visible(timeout=20_000)
    return heatmap


def test_a_live_run_is_watched_steered_and_survives_a_reload(page: Page, stack: Stack) -> None:
    prompt = stack.queue(
        demo_workflow(steps=STEPS, settings={"min_tokens": 0, "taylor_sigma_max": 1.0})
    )
    run_id = stack.run_of(prompt)["run_id"]
    heatmap = open_run(page, stack, run_id)

    # It fills while the sampler runs.
    wait_for(lambda: number(heatmap, "data-steps") >= 2, 90, "two steps drawn")
    early = number(heatmap, "data-steps")
    assert early < STEPS
    wait_for(lambda: number(heatmap, "data-steps") > early, 60, "a further step drawn")
    expect(page.get_by_test_id("run-status")).to_have_text(re.compile("running", re.I))

    # A setting is moved; the sampler says at which step it took it up.
    field = page.locator('[data-testid="field-taylor_sigma_max"] input:not([type=range])').first
    field.fill(str(LOWERED))
    page.get_by_test_id("apply-settings").click()
    revision = page.get_by_test_id("revision-1")
    expect(revision).to_have_attribute("data-state", "applied", timeout=60_000)
    applied = number(revision, "data-applied-step")
    assert 0 < applied < STEPS
    expect(revision).to_contain_text(f"applied at step {applied}")

    # A reload in the middle shows the same.
    drawn = number(heatmap, "data-steps")
    page.reload()
    expect(page.get_by_test_id("revision-1")).to_contain_text(f"applied at step {applied}")
    wait_for(lambda: number(heatmap, "data-steps") >= drawn, 30, "the steps before the reload")
    expect(field).to_have_value(str(LOWERED))

    run = stack.ended_run(prompt)
    assert run["status"] == "completed"
    assert run["steps_done"] == run["steps_total"] == STEPS
    wait_for(lambda: number(heatmap, "data-steps") == STEPS, 30, "every step drawn")
    expect(page.get_by_test_id("run-status")).to_have_text(re.compile("completed", re.I))

    rows = stack.sql(
        "SELECT step, sigma, revision, calls, calls_variant, calls_gated "
        "FROM layer_steps_readable WHERE run_id = ?",
        run_id,
    )
    assert len(rows) == STEPS * len(run["layers"])
    for row in rows:
        before = row["step"] < applied
        assert row["revision"] == (0 if before else 1)
        due = before or row["sigma"] <= LOWERED
        assert row["calls_variant"] == (row["calls"] if due else 0), dict(row)
        assert row["calls_gated"] == (0 if due else row["calls"]), dict(row)
    assert any(row["step"] >= applied and row["sigma"] > LOWERED for row in rows)


def test_the_server_is_killed_mid_run_and_nothing_is_missing(page: Page, stack: Stack) -> None:
    prompt = stack.queue(demo_workflow(steps=STEPS, seed=2, settings={"min_tokens": 0}))
    run_id = stack.run_of(prompt)["run_id"]
    heatmap = open_run(page, stack, run_id)
    wait_for(lambda: number(heatmap, "data-steps") >= 3, 90, "three steps drawn")

    stack.kill_server()
    expect(page.get_by_test_id("connection")).not_to_have_attribute(
        "data-state", "open", timeout=20_000
    )
    stack.start_server()
    expect(page.get_by_test_id("connection")).to_have_attribute(
        "data-state", "open", timeout=60_000
    )

    run = stack.ended_run(prompt)
    assert run["status"] == "completed"
    assert run["events_lost"] == 0
    steps = stack.sql(
        "SELECT step FROM steps JOIN runs ON runs.id = steps.run WHERE run_id = ? ORDER BY step",
        run_id,
    )
    assert [row["step"] for row in steps] == list(range(STEPS))
    layers = stack.sql(
        "SELECT count(*) AS n, count(DISTINCT step || '/' || layer) AS different "
        "FROM layer_steps_readable WHERE run_id = ?",
        run_id,
    )[0]
    assert layers["n"] == layers["different"] == STEPS * len(run["layers"])
    # The page went on by itself.
    wait_for(lambda: number(heatmap, "data-steps") == STEPS, 30, "every step drawn")
