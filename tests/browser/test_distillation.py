"""A distillation watched and steered from the page: fed by events, and by a real ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect
from support import events
from support.events import RunScript
from support.server import ServerProcess
from support.stack import Stack, demo_workflow, wait_for

pytestmark = pytest.mark.browser


def number(locator: Locator, attribute: str) -> int:
    """An element's attribute as a whole number; -1 where it has none yet."""
    text = locator.get_attribute(attribute)
    return int(text) if text else -1


class Plugin:
    """Hands a run's events to a real server, as the plugin does."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.instance = events.instance()

    def send(self, *items: Any) -> None:
        """Hand in events."""
        answer = httpx.post(
            f"{self.server.api}/ingest",
            content=events.batch_json(self.instance, *items),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 200, answer.text

    def get(self, path: str) -> Any:
        """Read something."""
        return httpx.get(f"{self.server.api}{path}").json()


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Plugin]:
    with ServerProcess(tmp_path / "data") as server:
        yield Plugin(server)


def drawn(page: Page, attribute: str) -> int:
    """What the map says of itself."""
    return number(page.get_by_test_id("training-heatmap"), f"data-{attribute}")


def open_training(page: Page, url: str, run_id: str, query: str = "") -> None:
    page.goto(f"{url}/runs/{run_id}{query}")
    expect(page.get_by_test_id("distillation")).to_be_visible(timeout=20_000)


def test_training_grows_is_zoomed_and_survives_a_reload(page: Page, plugin: Plugin) -> None:
    script = RunScript(layers=6, steps=30, variant="ttr")
    plugin.send(script.started())
    open_training(page, plugin.server.url, script.run_id)
    expect(page.get_by_test_id("training-empty")).to_contain_text("No update yet")

    # It grows while updates come in, without a reload.
    plugin.send(script.updates(range(1, 201)))
    updates = page.get_by_test_id("tile-updates")
    expect(updates).to_have_attribute("data-updates", "1200", timeout=20_000)
    wait_for(lambda: drawn(page, "last-update") == 200, 30, "200 updates drawn")
    plugin.send(script.updates(range(201, 301), step=1))
    wait_for(lambda: drawn(page, "last-update") == 300, 30, "300 updates drawn")
    expect(page.get_by_test_id("tile-double.0")).to_have_attribute("data-updates", "300")

    # A layer becomes ready live, and something goes wrong.
    assert page.get_by_test_id("readiness-double.0").get_attribute("data-ready") == "false"
    plugin.send(
        script.updates(range(301, 601), step=2),
        script.happened("ready", "double.0", 540, step=2),
        script.happened("out_of_memory", "single.1", 560, step=2, detail="chunk 64 → 32"),
    )
    expect(page.get_by_test_id("readiness-double.0")).to_have_attribute(
        "data-ready", "true", timeout=20_000
    )
    expect(page.get_by_test_id("event-ready")).to_contain_text("double.0")
    expect(page.get_by_test_id("tile-memory")).to_have_text("1")
    expect(page.get_by_test_id("event-out_of_memory")).to_contain_text("chunk 64 → 32")
    ready = plugin.get(f"/runs/{script.run_id}/distillation")["totals"]["ready"]
    expect(page.get_by_test_id("tile-ready")).to_have_attribute("data-ready", str(ready))

    # Zooming in asks for narrower buckets.
    page.get_by_test_id("training-metric").select_option("loss")
    expect(page.get_by_test_id("training-heatmap")).to_have_attribute("data-metric", "loss")
    wait_for(lambda: drawn(page, "last-update") == 600, 30, "600 updates drawn")
    wide = drawn(page, "width")
    box = page.get_by_test_id("training-heatmap").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.4, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
    page.mouse.up()
    expect(page).to_have_url(re.compile("updates="))
    wait_for(lambda: drawn(page, "from") > 100, 30, "the zoomed window drawn")
    assert drawn(page, "width") == 1 <= wide
    zoomed = drawn(page, "from"), drawn(page, "buckets")
    assert zoomed[1] < 150

    # The chosen layer, the metric and the zoom come back with a reload.
    page.get_by_test_id("tile-single.2").click()
    page.reload()
    wait_for(lambda: (drawn(page, "from"), drawn(page, "buckets")) == zoomed, 30, "the same view")
    expect(page.get_by_test_id("training-metric")).to_have_value("loss")
    expect(page.get_by_test_id("tile-single.2")).to_have_attribute("aria-pressed", "true")
    expect(updates).to_have_attribute("data-updates", "3600")
    expect(page.get_by_test_id("event-out_of_memory")).to_be_visible()
    page.get_by_test_id("training-follow").click()
    wait_for(lambda: drawn(page, "from") <= 1, 30, "all of it again")


def test_orders_of_the_view_are_acknowledged(page: Page, plugin: Plugin) -> None:
    script = RunScript(layers=3, steps=30, variant="ttr")
    plugin.send(script.started(), script.updates(range(1, 41)))
    open_training(page, plugin.server.url, script.run_id)

    def newest() -> dict[str, Any]:
        found: dict[str, Any] = plugin.get(f"/runs/{script.run_id}/revisions")["items"][-1]
        return found

    page.get_by_test_id("pause-training").click()
    state = page.get_by_test_id("pause-state")
    expect(state).to_have_attribute("data-state", "pending")
    pushed = newest()
    assert pushed["changes"] == {"training_paused": [False, True]}
    plugin.send(script.report(pushed["id"], "applied", 3))
    expect(state).to_contain_text("pause: applied at step 3")
    expect(page.get_by_test_id("pause-training")).to_have_text("Resume training")

    page.get_by_test_id("save-checkpoint").click()
    save = page.get_by_test_id("save-state")
    expect(save).to_have_attribute("data-state", "pending")
    pushed = newest()
    assert pushed["changes"] == {"checkpoint_now": [0, 1]}
    plugin.send(script.report(pushed["id"], "applied", 4))
    expect(save).to_have_attribute("data-saved", "false")
    plugin.send(script.happened("checkpoint_saved", detail="students.safetensors, 40 updates"))
    expect(save).to_have_attribute("data-saved", "true", timeout=20_000)
    expect(save).to_contain_text("students.safetensors")

    page.get_by_test_id("pause-training").click()
    wait_for(lambda: newest()["number"] == 3, 20, "the third revision")
    assert newest()["settings"]["training_paused"] is False


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_page(page: Page, plugin: Plugin, width: int) -> None:
    script = RunScript(layers=9, variant="ttr")
    plugin.send(script.started(), script.updates(range(1, 60)), script.ended())
    page.set_viewport_size({"width": width, "height": 900})
    open_training(page, plugin.server.url, script.run_id)
    expect(page.get_by_test_id("tile-double.0")).to_be_attached(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.comfyui
def test_a_real_distillation_is_paused_resumed_and_becomes_ready(page: Page, stack: Stack) -> None:
    steps = 40
    prompt = stack.queue(
        demo_workflow(
            steps=steps,
            size=256,
            node="AttnScopeFlux2TTR",
            settings={
                "mode": "distill",
                "progress_every": 2,
                "ready_min_updates": 4,
                "ready_threshold": 5.0,
                "training_steps": 10_000,
                "checkpoint": "browser-test",
            },
        )
    )
    run_id = stack.run_of(prompt)["run_id"]
    open_training(page, stack.server_url, run_id)
    heatmap = page.get_by_test_id("training-heatmap")
    expect(heatmap).to_be_visible(timeout=90_000)

    # Charts grow, and a layer becomes ready while it samples.
    wait_for(lambda: drawn(page, "last-update") >= 2, 90, "updates drawn")
    early = drawn(page, "last-update")
    wait_for(lambda: drawn(page, "last-update") > early, 60, "further updates drawn")
    expect(page.get_by_test_id("run-status")).to_have_text(re.compile("running", re.I))
    expect(page.locator('[data-testid^="readiness-"][data-ready="true"]').first).to_be_visible(
        timeout=90_000
    )

    # Paused and resumed from the page; between the two steps nothing is trained.
    page.get_by_test_id("pause-training").click()
    state = page.get_by_test_id("pause-state")
    expect(state).to_contain_text("pause: applied at step", timeout=60_000)
    page.get_by_test_id("save-checkpoint").click()
    expect(page.get_by_test_id("save-state")).to_have_attribute(
        "data-saved", "true", timeout=60_000
    )
    page.get_by_test_id("pause-training").click()
    expect(state).to_contain_text("resume: applied at step", timeout=60_000)

    run = stack.ended_run(prompt)
    assert run["status"] == "completed"
    applied = {
        item["changes"]["training_paused"][1]: item["applied_step"]
        for item in stack.api(f"/runs/{run_id}/revisions")["items"]
        if "training_paused" in item["changes"]
    }
    trained = {
        row["step"]
        for row in stack.sql(
            "SELECT DISTINCT step FROM student_updates "
            "JOIN runs ON runs.id = student_updates.run WHERE run_id = ?",
            run_id,
        )
    }
    assert trained and not trained & set(range(applied[True], applied[False]))
    assert max(trained) >= applied[False]

    # A reload shows all of it again.
    made = stack.api(f"/runs/{run_id}/distillation")
    assert made["totals"]["ready"] > 0
    page.reload()
    expect(page.get_by_test_id("tile-updates")).to_have_attribute(
        "data-updates", str(made["totals"]["updates"]), timeout=20_000
    )
    expect(page.get_by_test_id("tile-ready")).to_have_attribute(
        "data-ready", str(made["totals"]["ready"])
    )
    expect(page.get_by_test_id("event-checkpoint_saved").first).to_be_visible()
