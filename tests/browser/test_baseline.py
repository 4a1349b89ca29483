"""An approximating run against its exact baseline, in the page: both sampled for real."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect
from support.stack import Stack, demo_workflow, wait_for

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]

SIZE = 256
STEPS = 8
SEED = 11


def sampled(stack: Stack, **changes: object) -> str:
    """A finished run of the demo, with its picture at the server; its id."""
    workflow = demo_workflow(**{"steps": STEPS, "seed": SEED, "size": SIZE, **changes})  # type: ignore[arg-type]
    run = stack.ended_run(stack.queue(workflow))
    assert run["status"] == "completed"
    run_id = str(run["run_id"])
    wait_for(lambda: stack.api(f"/runs/{run_id}")["final"], 60, "the finished picture")
    return run_id


def exact(stack: Stack, label: str, **changes: object) -> str:
    return sampled(stack, node="AttnScopeMonitor", settings={"label": label}, **changes)


def test_a_run_is_compared_with_its_baseline_as_soon_as_its_picture_comes(
    page: Page, stack: Stack
) -> None:
    older, newer = exact(stack, "older reference"), exact(stack, "newer reference")
    exact(stack, "another seed", seed=SEED + 1)
    prompt = stack.queue(
        demo_workflow(
            steps=STEPS, seed=SEED, size=SIZE, settings={"min_tokens": 0, "taylor_sigma_max": 0.7}
        )
    )
    run_id = stack.run_of(prompt)["run_id"]
    page.goto(f"{stack.server_url}/runs/{run_id}")

    # The page finds the newest exact run of this prompt and seed by itself.
    panel = page.get_by_test_id("baseline-panel")
    expect(panel).to_have_attribute("data-baseline", newer, timeout=20_000)
    expect(page.get_by_test_id("figure-psnr")).to_be_visible(timeout=90_000)

    # It shows what the server has computed.
    answer = stack.api(f"/runs/{run_id}/comparison?with={newer}")
    [pair] = answer["images"]
    assert pair["lossless"] and not pair["identical"]
    assert (pair["width"], pair["height"]) == (SIZE, SIZE)
    expect(page.get_by_test_id("figure-psnr")).to_have_text(f"{pair['psnr']:.2f} dB")
    expect(page.get_by_test_id("figure-ssim")).to_have_text(f"{pair['ssim']:.4f}")
    way = "slower" if answer["attn_ms"]["ratio"] > 1 else "faster"
    expect(page.get_by_test_id("figure-attention")).to_contain_text(way)
    expect(page.get_by_test_id("caveats")).to_have_count(0)

    # The slider goes by keyboard, to both ends.
    slider, wipe = page.get_by_test_id("wipe-slider"), page.get_by_test_id("wipe")
    slider.focus()
    expect(wipe).to_have_attribute("data-reach", "50")
    for key, reach in (("ArrowRight", "51"), ("ArrowLeft", "50"), ("End", "100"), ("Home", "0")):
        page.keyboard.press(key)
        expect(wipe).to_have_attribute("data-reach", reach)
    expect(slider).to_have_attribute("aria-valuetext", re.compile("^0 % "))

    # Another way to look and another baseline stand in the address and survive a reload.
    page.get_by_test_id("compare-error").click()
    page.get_by_test_id("baseline-select").select_option(older)
    expect(panel).to_have_attribute("data-baseline", older)
    expect(page).to_have_url(re.compile(rf"baseline={older}.*compare=error"))
    page.reload()
    expect(panel).to_have_attribute("data-baseline", older, timeout=20_000)
    image = page.get_by_test_id("error-map").locator("img")
    expect(image).to_be_visible(timeout=20_000)
    wait_for(lambda: image.evaluate("img => img.naturalWidth") == SIZE, 20, "the map is drawn")


def test_the_page_says_how_to_get_a_baseline_and_takes_it_when_it_comes(
    page: Page, stack: Stack
) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    run_id = sampled(stack, seed=SEED + 7, settings={"enabled": False})
    page.goto(f"{stack.server_url}/runs/{run_id}")
    expect(page.get_by_test_id("baseline-waiting")).to_contain_text(
        "Run the same prompt with the AttnScope Monitor node", timeout=20_000
    )

    # A run whose variant is off is exact: not a pixel differs, losslessly kept.
    exact(stack, "", seed=SEED + 7)
    expect(page.get_by_test_id("figure-psnr")).to_have_text("identical", timeout=60_000)
    expect(page.get_by_test_id("figure-ssim")).to_have_text("1")
    page.get_by_test_id("compare-side").click()
    expect(page.get_by_test_id("side-by-side").locator("img")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
