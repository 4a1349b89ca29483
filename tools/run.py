"""`make run`: the server, a ComfyUI with the plugin, and a first run to watch.

Ports: ATTNSCOPE_PORT (8420) and COMFYUI_PORT (8188). COMFYUI_DIR names a ComfyUI of your own,
COMFYUI_PYTHON the Python that it runs under.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from comfyui import comfyui_python, ensure_comfyui, own_comfyui, start_comfyui
from page import ensure_page
from processes import Service
from serve import server_port, start_server
from setup import ensure_venv, venv_python
from toolkit import ROOT, Failure, check_port, port_from_environment, say, start

DEMO = ROOT / "comfy_plugin" / "demo"
COMFYUI_PORT = 8188

T = TypeVar("T")


def call_json(url: str, body: Any = None) -> Any:
    """Ask a service on this machine; a refusal's text is part of the failure."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("ATTNSCOPE_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10.0) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refused:
        text = refused.read().decode(errors="replace")[:2000]
        raise Failure(f"{url} answered {refused.code}: {text}") from None
    except OSError as broken:
        raise Failure(f"{url} did not answer ({broken}).") from None


def until(ask: Callable[[], T | None], services: list[Service], seconds: float, what: str) -> T:
    """Poll for an answer while every service is alive."""
    deadline = time.monotonic() + seconds
    while True:
        for service in services:
            service.check()
        answer = ask()
        if answer is not None:
            return answer
        if time.monotonic() > deadline:
            raise Failure(
                f"{what} did not happen within {seconds:g} seconds: see the logs in "
                f"{', '.join(str(service.log) for service in services)}."
            )
        time.sleep(0.3)


class Demo:
    """One execution of the demo workflow: queued at ComfyUI, watched at the server."""

    def __init__(self, comfyui_url: str, server_url: str) -> None:
        self.comfyui_url = comfyui_url
        self.server_url = server_url
        self.prompt_id = ""

    def queue(self) -> None:
        """Queue the workflow."""
        workflow = json.loads((DEMO / "workflow_api.json").read_text(encoding="utf-8"))
        answer = call_json(f"{self.comfyui_url}/prompt", {"prompt": workflow})
        if answer.get("node_errors"):
            raise Failure(f"ComfyUI refused the demo workflow: {answer['node_errors']}")
        self.prompt_id = answer["prompt_id"]

    def outcome(self) -> str | None:
        """ComfyUI's word on it, "success" or "error"; None as long as it runs."""
        entry = call_json(f"{self.comfyui_url}/history/{self.prompt_id}").get(self.prompt_id)
        return None if entry is None else str(entry["status"]["status_str"])

    def run(self) -> dict[str, Any] | None:
        """The server's record of its first sampler run; None until the plugin has reported it."""
        for run in call_json(f"{self.server_url}/api/v1/runs?limit=50")["items"]:
            if run["sampling"]["prompt_id"] == self.prompt_id:
                return dict(run)
        return None

    def begun(self) -> dict[str, Any] | None:
        """As `run`, but fails when ComfyUI has already given up."""
        run = self.run()
        if run is None and self.outcome() == "error":
            raise Failure("the demo run failed in ComfyUI: see .run/logs/comfyui.log.")
        return run

    def finished(self) -> dict[str, Any] | None:
        """The server's record once ComfyUI and the server both say that it has ended."""
        if self.outcome() is None:
            return None
        run = self.run()
        return run if run is not None and run["status"] != "running" else None


def open_browser(url: str) -> None:
    """Show the page where there is a desktop; a text browser would take the terminal."""
    if sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    ):
        webbrowser.open(url)


def print_addresses(server_url: str, comfyui_url: str, run_url: str | None) -> None:
    """Say where everything is."""
    rows = [("dashboard", server_url), ("ComfyUI", comfyui_url)]
    if run_url:
        rows.append(("this run", run_url))
    print()
    for name, url in rows:
        print(f"    {name:<10} {url}")
    print(flush=True)


def print_advice() -> None:
    """Say what to do next."""
    workflow = (DEMO / "workflow.json").relative_to(ROOT)
    print(
        f"    Another run: drag {workflow} into ComfyUI's page, change the seed and press Run.\n"
        "    Ctrl+C stops both.\n",
        flush=True,
    )


def watch(services: list[Service]) -> None:
    """Stay until one of them dies, which is a failure, or until Ctrl+C."""
    while True:
        for service in services:
            service.check()
        time.sleep(0.5)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/run.py", description=__doc__)
    parser.add_argument("--no-browser", action="store_true", help="do not open the page")
    parser.add_argument("--no-demo", action="store_true", help="do not queue the demo run")
    parser.add_argument(
        "--once", action="store_true", help="stop everything when the demo run has completed"
    )
    options = parser.parse_args()
    if options.once and options.no_demo:
        parser.error("--once waits for the demo run, which --no-demo leaves out")
    return options


def main() -> int:
    options = parse_options()
    # A service manager's stop and a closed terminal are a Ctrl+C: nothing may stay behind.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)

    port = server_port()
    comfyui_port = port_from_environment("COMFYUI_PORT", COMFYUI_PORT)
    check_port(comfyui_port, "COMFYUI_PORT", "ComfyUI")
    if port == comfyui_port:
        raise Failure("ATTNSCOPE_PORT and COMFYUI_PORT are the same: choose two different ports.")
    # Wrong names are refused before anything is installed; a Python of the user's own has what
    # its ComfyUI needs.
    own_comfyui()
    own_python = comfyui_python() != venv_python()
    ensure_venv("server", *([] if own_python else ["comfyui"]))
    ensure_page()
    comfy_dir = ensure_comfyui()

    server_url, comfyui_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{comfyui_port}"
    with ExitStack() as running:
        say("starting the server")
        server = start_server(port)
        running.callback(server.stop)
        say(f"starting ComfyUI from {comfy_dir}")
        comfyui = start_comfyui(comfy_dir, comfyui_port, extra_env={"ATTNSCOPE_URL": server_url})
        running.callback(comfyui.stop)
        services = [server, comfyui]

        demo = Demo(comfyui_url, server_url)
        run_url = None
        if not options.no_demo:
            say("queueing the demo run")
            demo.queue()
            run = until(demo.begun, services, 180.0, "the demo run's first report")
            run_url = f"{server_url}/runs/{run['run_id']}"
        print_addresses(server_url, comfyui_url, run_url)
        if options.once:
            run = until(demo.finished, services, 900.0, "the end of the demo run")
            if run["status"] != "completed":
                raise Failure(f"the demo run is {run['status']}: see {comfyui.log}.")
            say("the demo run is complete")
            return 0
        print_advice()
        if not options.no_browser:
            open_browser(run_url or server_url)
        try:
            watch(services)
        except KeyboardInterrupt:
            print()
            say("stopping")
    return 0


if __name__ == "__main__":
    start(main)
