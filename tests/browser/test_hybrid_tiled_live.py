"""A hybrid and a tiled run, steered from the page while they sample: everything is real."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect
from support.stack import Stack, demo_workflow, wait_for

from attnscope.attention.hybrid import schedules
from attnscope.attention.settings import HybridSettings

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]

STEPS = 30
IMAGE_TOKENS = 1024
SEED = 5
TILED_SIZE = 384
"""Pixels: 24×24 tokens, 3×3 tiles."""


def field_of(page: Page, name: str) -> Locator:
    """The input of a setting."""
    return page.locator(f'[data-testid="field-{name}"] input:not([type=range])').first


def drawn(page: Page, name: str) -> list[float]:
    """The numbers of a schedule as the page holds them, one a step."""
    cells = page.get_by_test_id(f"schedule-{name}").locator("td").all_text_contents()
    return [float(text) for text in cells]


def apply(page: Page, number: int) -> int:
    """Send the form; the step at which the sampler took it up as that revision."""
    page.get_by_test_id("apply-settings").click()
    revision = page.get_by_test_id(f"revision-{number}")
    expect(revision).to_have_attribute("data-state", "applied", timeout=60_000)
    step = int(revision.get_attribute("data-applied-step") or -1)
    assert 0 < step < STEPS
    expect(revision).to_contain_text(f"applied at step {step}")
    return step


def rows_of(stack: Stack, run: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a step and layer, all of them there."""
    rows = stack.sql("SELECT * FROM layer_steps_readable WHERE run_id = ?", run["run_id"])
    assert len(rows) == STEPS * len(run["layers"])
    return [dict(row) for row in rows]


def test_the_schedules_of_a_hybrid_are_seen_typed_and_applied(page: Page, stack: Stack) -> None:
    settings: dict[str, Any] = {"min_tokens": 0, "local_window": 128}
    prompt = stack.queue(demo_workflow(steps=STEPS, node="AttnScopeHybrid", settings=settings))
    run_id = stack.run_of(prompt)["run_id"]
    page.goto(f"{stack.server_url}/runs/{run_id}")
    panel = page.get_by_test_id("schedules")
    expect(panel).to_be_visible(timeout=20_000)
    wait_for(lambda: drawn(page, "local_window") == [128.0] * STEPS, 30, "the window over the run")
    wait_for(lambda: drawn(page, "global_weight") == [1.0] * STEPS, 30, "the weight over the run")
    expect(panel.locator(".main-svg").first).to_be_visible(timeout=20_000)

    # It follows each key while a field is typed, and the field stays where it is.
    weight = field_of(page, "global_weight")
    weight.scroll_into_view_if_needed()
    weight.fill("")
    place = weight.bounding_box()
    for text in ("0.5", "0.25", "0"):
        weight.fill(text)
        wait_for(
            lambda text=text: drawn(page, "global_weight") == [float(text)] * STEPS,
            20,
            f"the weight {text}",
        )
        expect(weight).to_be_focused()
        assert weight.bounding_box() == place
    without = apply(page, 1)

    # A window that follows sigma: everything at the beginning, less and less towards the end.
    changes = {
        "local_window_min": 128, "local_window_sigma_low": 0.3, "local_window_sigma_high": 0.6,
    }  # fmt: skip
    for name, value in changes.items():
        field_of(page, name).fill(str(value))
    sigmas = stack.api(f"/runs/{run_id}")["sampling"]["sigmas"][:STEPS]
    wanted = HybridSettings(**{**settings, "global_weight": 0.0, **changes})
    tokens = stack.api(f"/runs/{run_id}/schedules", {"settings": {}}, "POST")["tokens"]
    assert tokens > IMAGE_TOKENS
    windows = [schedules.local_window(wanted, sigma, tokens) for sigma in sigmas]
    assert windows[0] == tokens and windows[-1] == 128
    # The page shows three digits.
    shown = [float(f"{window:.3g}") if window < 1000 else float(window) for window in windows]
    wait_for(lambda: drawn(page, "local_window") == shown, 20, "the window's schedule")
    followed = apply(page, 2)
    assert followed > without

    # Where the window is everything the call is exact, and the page says why.
    row = page.get_by_test_id("reason-window_full")
    expect(row).to_contain_text("window holds all tokens", timeout=60_000)
    expect(row).to_contain_text("gate")

    run = stack.ended_run(prompt)
    assert run["status"] == "completed"
    for cell in rows_of(stack, run):
        step = cell["step"]
        assert cell["revision"] == (0 if step < without else 1 if step < followed else 2)
        full = step >= followed and windows[step] >= IMAGE_TOKENS
        assert cell["calls_gated"] == (cell["calls"] if full else 0), cell
        # Only the series has denominators of its own.
        assert (cell["denom_min"] is not None) == (step < without), cell
    assert any(windows[step] >= IMAGE_TOKENS for step in range(followed, STEPS))
    assert any(windows[step] < IMAGE_TOKENS for step in range(followed, STEPS))


def test_the_radius_of_a_tiled_run_is_applied_and_its_picture_compared(
    page: Page, stack: Stack
) -> None:
    how: dict[str, Any] = {"steps": STEPS, "seed": SEED, "size": TILED_SIZE}
    exact = stack.ended_run(stack.queue(demo_workflow(**how, node="AttnScopeMonitor")))
    settings = {"min_tokens": 0, "window_radius": 0, "quality_every": 1}
    prompt = stack.queue(demo_workflow(**how, node="AttnScopeTiled", settings=settings))
    run_id = stack.run_of(prompt)["run_id"]
    page.goto(f"{stack.server_url}/runs/{run_id}")
    expect(page.get_by_test_id("heatmap")).to_be_visible(timeout=20_000)

    # The first steps are exact, and the page says why.
    row = page.get_by_test_id("reason-dense_step")
    expect(row).to_contain_text("dense_first_steps keeps exact", timeout=60_000)
    expect(row).to_contain_text("gate")
    # Nothing that follows sigma, so no schedules.
    expect(page.get_by_test_id("schedules")).to_have_count(0)

    heatmap = page.get_by_test_id("heatmap")
    wait_for(lambda: int(heatmap.get_attribute("data-steps") or 0) > 4, 60, "tiled steps")
    field_of(page, "window_radius").fill("1")
    applied = apply(page, 1)
    run = stack.ended_run(prompt)
    assert run["status"] == "completed"
    for cell in rows_of(stack, run):
        dense = cell["step"] < 2
        assert cell["calls_gated"] == (cell["calls"] if dense else 0), cell
        assert cell["revision"] == (0 if cell["step"] < applied else 1)
        if not dense:
            # A window of 3×3 tiles is the whole picture: nothing is left but rounding.
            assert (cell["nmse"] < 1e-9) == (cell["step"] >= applied), cell

    # Two of thirty steps, at six layers.
    expect(row).to_contain_text("12 (6.7 %)", timeout=20_000)
    expect(page.get_by_test_id("baseline-panel")).to_have_attribute(
        "data-baseline", exact["run_id"], timeout=20_000
    )
    expect(page.get_by_test_id("figure-psnr")).to_be_visible(timeout=60_000)
    [pair] = stack.api(f"/runs/{run_id}/comparison?with={exact['run_id']}")["images"]
    assert not pair["identical"] and pair["psnr"] > 20.0
    expect(page.get_by_test_id("figure-psnr")).to_have_text(f"{pair['psnr']:.2f} dB")
    expect(page.get_by_test_id("figure-ssim")).to_have_text(f"{pair['ssim']:.4f}")
