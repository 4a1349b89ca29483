"""The whole product as processes: a server, a ComfyUI with the plugin, and runs in it."""

from __future__ import annotations

import copy
import json
import socket
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from comfyui import ensure_comfyui, start_comfyui  # noqa: E402
from processes import Service  # noqa: E402
from serve import start_server  # noqa: E402

T = TypeVar("T")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(ask: Callable[[], T | None], seconds: float, what: str) -> T:
    """Ask until the answer is neither None nor False; AssertionError at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        answer = ask()
        if answer is not None and answer is not False:
            return answer
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


def call(url: str, body: Any = None, method: str | None = None) -> Any:
    """JSON over HTTP to this machine."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json"}, method=method
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=20.0) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def demo_workflow(
    *,
    steps: int = 30,
    seed: int = 1,
    size: int = 512,
    text: str | None = None,
    node: str = "AttnScopeTaylor",
    settings: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The demo's API workflow with some of its inputs changed.

    Args:
        steps: of the sampler.
        seed: of the noise.
        size: of the picture, in pixels a side.
        text: caption, where not the demo's own.
        node: class of the node between model and sampler.
        settings: inputs of that node.
        sampler: further inputs of the KSampler.
    """
    path = ROOT / "comfy_plugin" / "demo" / "workflow_api.json"
    workflow = copy.deepcopy(json.loads(path.read_text(encoding="utf-8")))
    for item in workflow.values():
        inputs = item["inputs"]
        if item["class_type"] == "KSampler":
            inputs.update({"steps": steps, "seed": seed, **(sampler or {})})
        if item["class_type"] == "AttnScopeTaylor":
            item["class_type"] = node
            item["inputs"] = {"model": inputs["model"], **(settings or {})}
        if {"width", "height"} <= set(inputs):
            inputs.update({"width": size, "height": size})
        if text is not None and inputs.get("text"):
            inputs["text"] = text
    return workflow


class Stack:
    """A server and a ComfyUI on ports of their own, with data in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.server_port, self.comfyui_port = free_port(), free_port()
        self.server_url = f"http://127.0.0.1:{self.server_port}"
        self.comfyui_url = f"http://127.0.0.1:{self.comfyui_port}"
        self.server: Service | None = None
        self.comfyui: Service | None = None

    def start(self) -> None:
        """Start both."""
        self.start_server()
        self.comfyui = start_comfyui(
            ensure_comfyui(),
            self.comfyui_port,
            base_directory=self.folder / "comfyui",
            extra_env={"ATTNSCOPE_URL": self.server_url},
            log=self.folder / "comfyui.log",
        )

    def start_server(self) -> None:
        """Start the server, on the same port and data as before."""
        self.server = start_server(
            self.server_port, data=self.data, log=self.folder / f"server-{time.time_ns()}.log"
        )

    def kill_server(self) -> None:
        """SIGKILL: nothing is flushed, nothing is said."""
        assert self.server is not None
        self.server.process.kill()
        self.server.process.wait()

    def stop(self) -> None:
        """Stop both."""
        for service in (self.comfyui, self.server):
            if service is not None:
                service.stop()

    def queue(self, workflow: dict[str, Any]) -> str:
        """Queue a prompt at ComfyUI; its id."""
        answer = call(f"{self.comfyui_url}/prompt", {"prompt": workflow})
        assert not answer.get("node_errors"), answer
        return str(answer["prompt_id"])

    def prompt_status(self, prompt_id: str) -> str | None:
        """ComfyUI's word on a prompt that has ended: "success" or "error"."""
        entry = call(f"{self.comfyui_url}/history/{prompt_id}").get(prompt_id)
        return None if entry is None else str(entry["status"]["status_str"])

    def api(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """Ask the server; ``path`` is below /api/v1."""
        return call(f"{self.server_url}/api/v1{path}", body, method)

    def runs_of(self, prompt_id: str) -> list[dict[str, Any]]:
        """The server's runs of a prompt, oldest first; none while it does not answer."""
        try:
            items = self.api("/runs?limit=200")["items"]
        except OSError:
            return []
        found = [run for run in items if run["sampling"]["prompt_id"] == prompt_id]
        return sorted(found, key=lambda run: float(run["started_at"]))

    def run_of(self, prompt_id: str, seconds: float = 60.0) -> dict[str, Any]:
        """The first run of a prompt, as soon as the server knows it."""
        return wait_for(
            lambda: next(iter(self.runs_of(prompt_id)), None), seconds, "the run at the server"
        )

    def ended_run(self, prompt_id: str, seconds: float = 240.0) -> dict[str, Any]:
        """The first run of a prompt once ComfyUI and the server say that it has ended."""

        def ended() -> dict[str, Any] | None:
            if self.prompt_status(prompt_id) is None:
                return None
            run = next(iter(self.runs_of(prompt_id)), None)
            return run if run is not None and run["status"] != "running" else None

        return wait_for(ended, seconds, "the end of the run")

    def sql(self, query: str, *parameters: Any) -> list[sqlite3.Row]:
        """Read the server's database, beside the server."""
        path = next(self.data.glob("*.db"))
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(query, parameters).fetchall()
