"""What settings would let follow sigma, drawn over a run's own steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.events import RunScript

from attnscope.attention.hybrid import schedules
from attnscope.attention.settings import HybridSettings

SETTINGS = {
    "local_window_min": 100, "local_window_max": 0, "local_window_sigma_low": 0.3,
    "local_window_sigma_high": 0.9, "global_weight": 0.8, "global_sigma_low": 0.4,
    "global_sigma_high": 1.0,
}  # fmt: skip


def ask(api: Any, script: RunScript, settings: dict[str, Any]) -> Any:
    return api.client.post(f"/api/v1/runs/{script.run_id}/schedules", json={"settings": settings})


@pytest.mark.parametrize("closed", [0, 2])
def test_the_sampler_and_the_page_follow_one_definition(api: Any, closed: int) -> None:
    import plotly.io

    script = RunScript(variant="hybrid", steps=10, layers=2)
    api.send(script.started(), *(script.step(step) for step in range(closed)))
    answer = ask(api, script, SETTINGS).json()
    # 64 × 64 latent pixels at 2 × 2 a token, and as the calls had it once a step has closed.
    assert answer["tokens"] == (1024 + 256 if closed else 1024)
    settings = HybridSettings(**SETTINGS)
    sigmas = [1.0 - step / 10 for step in range(10)]
    (window,) = answer["figures"]["local_window"]["data"]
    assert window["y"] == [
        schedules.local_window(settings, sigma, answer["tokens"]) for sigma in sigmas
    ]
    (weight,) = answer["figures"]["global_weight"]["data"]
    assert weight["y"] == [schedules.global_weight(settings, sigma) for sigma in sigmas]
    assert window["x"] == list(range(10)) and window["customdata"] == sigmas
    for figure in answer["figures"].values():
        plotly.io.from_json(json.dumps(figure))


def test_settings_lie_over_those_in_force_and_change_nothing(api: Any) -> None:
    script = RunScript(variant="hybrid", steps=4)
    api.send(script.started())
    before = api.get(f"/runs/{script.run_id}")
    assert set(ask(api, script, {}).json()["figures"]["local_window"]["data"][0]["y"]) == {512}
    asked = ask(api, script, {"local_window": 77}).json()
    assert set(asked["figures"]["local_window"]["data"][0]["y"]) == {77}
    assert api.get(f"/runs/{script.run_id}") == before


def test_bad_settings_are_named(api: Any) -> None:
    script = RunScript(variant="hybrid")
    api.send(script.started())
    refused = ask(api, script, {"global_weight": 99})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "settings.global_weight"
    crossed = ask(api, script, {"local_window_max": 7})
    assert crossed.json()["errors"][0]["field"] == "settings.local_window_max"
    assert "512" in crossed.json()["errors"][0]["allowed"]


def test_a_variant_without_schedules_has_no_figures(api: Any) -> None:
    script = RunScript()
    api.send(script.started())
    assert ask(api, script, {}).json()["figures"] == {}
    variants = {item["name"]: item for item in api.get("/schema/variants")["variants"]}
    assert variants["taylor"]["schedules"] == []
    assert [item["name"] for item in variants["hybrid"]["schedules"]] == [
        "local_window", "global_weight",
    ]  # fmt: skip
    assert variants["hybrid"]["title"] == "Hybrid attention"
