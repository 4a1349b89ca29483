"""The plugin in a real ComfyUI process, loaded from ``custom_nodes`` and asked over HTTP."""

from __future__ import annotations

import io
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from receiver import Receiver, wait_for
from support.stack import call, free_port

from attnscope.attention.settings import SETTINGS

pytestmark = pytest.mark.comfyui


class ComfyUI:
    """A running ComfyUI with the receiver as its server."""

    def __init__(self, url: str, receiver: Receiver, log: Path) -> None:
        self.url = url
        self.receiver = receiver
        self.log = log

    def queue(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Run a prompt to its end; its history."""
        prompt_id = call(f"{self.url}/prompt", {"prompt": graph})["prompt_id"]
        return wait_for(
            lambda: call(f"{self.url}/history/{prompt_id}").get(prompt_id),
            240.0,
            "the prompt's end",
        )

    def run_of(self, history: dict[str, Any]) -> dict[int, Any]:
        """The events of a prompt's only run by their seq, growing as they come."""
        prompt_id = history["prompt"][1]

        def found() -> dict[int, Any] | None:
            for events in list(self.receiver.events.values()):
                if 0 in events and events[0].sampling.prompt_id == prompt_id:
                    return events
            return None

        return wait_for(found, 30.0, "the run's beginning")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    from comfyui import ensure_comfyui, start_comfyui

    folder = tmp_path_factory.mktemp("process")
    port = free_port()
    with Receiver() as receiver:
        service = start_comfyui(
            ensure_comfyui(),
            port,
            base_directory=folder / "base",
            extra_env={"ATTNSCOPE_URL": receiver.url, "ATTNSCOPE_LINGER_S": "5"},
            log=folder / "comfyui.log",
        )
        try:
            yield ComfyUI(f"http://127.0.0.1:{port}", receiver, folder / "comfyui.log")
        finally:
            service.stop()


def graph(node: str = "AttnScopeMonitor", **settings: Any) -> dict[str, Any]:
    """The demo, small: two steps of 64 image tokens."""
    return {
        "1": {"class_type": "AttnScopeDemoModel", "inputs": {}},
        "2": {"class_type": node, "inputs": {"model": ["1", 0], **settings}},
        "3": {
            "class_type": "AttnScopeDemoPrompt",
            "inputs": {"text": "small red circle", "width": 128, "height": 128},
        },
        "4": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": 1},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["2", 0], "positive": ["3", 0], "negative": ["3", 0],
                "latent_image": ["4", 0], "seed": 3, "steps": 2, "cfg": 1.0, "denoise": 1.0,
                "sampler_name": "euler", "scheduler": "simple",
            },
        },
        "6": {"class_type": "AttnScopeDemoDecode", "inputs": {"samples": ["5", 0]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "t"}},
    }  # fmt: skip


def test_the_nodes_inputs_are_the_settings(process: ComfyUI) -> None:
    for node, variant in (
        ("AttnScopeTaylor", "taylor"),
        ("AttnScopeHybrid", "hybrid"),
        ("AttnScopeTiled", "tiled"),
        ("AttnScopeFlux2TTR", "ttr"),
        ("AttnScopeRouter", "router"),
        ("AttnScopeMonitor", "exact"),
    ):
        info = call(f"{process.url}/object_info/{node}")[node]
        inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
        assert set(inputs) == {"model", "server_url", "label", *SETTINGS[variant].model_fields}
        for name, field in SETTINGS[variant].model_fields.items():
            options = inputs[name][1]
            assert options["default"] == field.default
            assert field.description in options["tooltip"]
    taylor = call(f"{process.url}/object_info/AttnScopeTaylor")["AttnScopeTaylor"]
    inputs = taylor["input"].get("required", {}) | taylor["input"].get("optional", {})
    assert (inputs["P"][1]["min"], inputs["P"][1]["max"]) == (1, 8)
    assert 0 < inputs["eps"][1]["min"] <= 1e-6
    assert taylor["category"] == "AttnScope"


def test_a_prompt_s_run_tells_all_about_itself(process: ComfyUI) -> None:
    history = process.queue(graph(label="from the process"))
    assert history["status"]["status_str"] == "success"
    process.receiver.finished()

    def complete() -> list[Any]:
        events = process.receiver.run()
        return events if getattr(events[-1], "image_kind", "") == "final" else []

    events = wait_for(complete, 30.0, "the finished picture")
    started, sampling = events[0], events[0].sampling
    assert started.label == "from the process"
    assert (sampling.sampler, sampling.seed, sampling.cfg, sampling.denoise) == ("euler", 3, 1, 1)
    assert (sampling.node_id, sampling.list_index) == ("5", 0)
    assert sampling.prompt_id
    images = [event for event in events if event.kind == "image"]
    assert [(i.image_kind, i.step) for i in images] == [
        ("preview", 0), ("preview", 1), ("final", None)
    ]  # fmt: skip
    assert (images[-1].width, images[-1].height) == (128, 128)
    assert [event.seq for event in events] == list(range(len(events)))
    instance = process.receiver.batches[-1].instance
    assert instance.name.endswith(process.url.rpartition(":")[2])


def test_a_finished_picture_comes_as_comfyui_saved_it(process: ComfyUI) -> None:
    history = process.queue(graph())
    [saved] = history["outputs"]["7"]["images"]
    run = process.run_of(history)

    def final() -> Any:
        return next((e for e in run.values() if getattr(e, "image_kind", "") == "final"), None)

    sent = wait_for(final, 30.0, "the finished picture")
    folder = process.log.parent / "base" / "output" / saved["subfolder"]
    with Image.open(folder / saved["filename"]) as picture:
        expected = np.asarray(picture.convert("RGB"))
    assert sent.media_type == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sent.data))), expected)


def test_runs_that_differ_in_our_node_alone_have_one_recipe(process: ComfyUI) -> None:
    def recipe(made: dict[str, Any]) -> str:
        run = process.run_of(process.queue(made))
        return str(run[0].sampling.recipe)

    # A label of its own: ComfyUI does not sample again what it has in its cache.
    exact = recipe(graph(label="a baseline"))
    assert len(exact) == 64
    assert recipe(graph("AttnScopeTaylor", min_tokens=0, P=2)) == exact
    text, seed, between = graph(), graph(), graph()
    text["3"]["inputs"]["text"] = "small blue circle"
    seed["5"]["inputs"]["seed"] = 4
    between["8"] = {
        "class_type": "ModelSamplingFlux",
        "inputs": {
            "model": ["1", 0], "max_shift": 1.15, "base_shift": 0.5, "width": 128, "height": 128,
        },
    }  # fmt: skip
    between["2"]["inputs"]["model"] = ["8", 0]
    others = [recipe(made) for made in (text, seed, between)]
    assert len({exact, *others}) == 4


def test_a_bad_value_is_named_at_the_node(process: ComfyUI) -> None:
    history = process.queue(graph(server_url="nowhere"))
    assert history["status"]["status_str"] == "error"
    (error,) = [m[1] for m in history["status"]["messages"] if m[0] == "execution_error"]
    assert "server_url: is 'nowhere'; allowed:" in error["exception_message"]
    with pytest.raises(urllib.error.HTTPError):
        process.queue(graph("AttnScopeTaylor", P=99))


def test_comfyui_s_page_gets_its_part(process: ComfyUI) -> None:
    assert call(f"{process.url}/attnscope/config") == {
        "url": process.receiver.url,
        "disabled": False,
    }
    assert any(path.endswith("/attnscope.js") for path in call(f"{process.url}/extensions"))
