"""Training metrics to Comet: its own offline experiment judges what is sent."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from attnscope.attention.distillation import Occurrence, StudentEvent, Update
from attnscope.attention.settings import TtrSettings
from attnscope.comfy_plugin import comet
from attnscope.comfy_plugin.comet import CometLog, comet_for

SEND = """
import sys
from attnscope.attention.distillation import Occurrence, StudentEvent, Update
from attnscope.attention.settings import TtrSettings
from attnscope.comfy_plugin.comet import comet_for

log = comet_for(TtrSettings(comet_project="mine"), "flux.safetensors")
log.every = 2
for number in range(1, 6):
    metrics = {"loss": 1.0 / number, **({"nmse": 0.25} if number == 3 else {})}
    log.updated([Update("single.0", number, 0, 0.0, metrics)], 0)
log.happened(Occurrence(StudentEvent.READY, "single.0", 5, 2, "NMSE 0.01"))
log.close()
assert log.join(60.0)
"""


class Experiment:
    """Stands in for one of Comet's."""

    def __init__(self) -> None:
        self.metrics: list[tuple[dict[str, float], int]] = []
        self.others: dict[str, str] = {}
        self.ended = False

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.metrics.append((dict(metrics), step))

    def log_other(self, name: str, value: str) -> None:
        self.others[name] = value

    def end(self) -> None:
        self.ended = True


def update(number: int, **metrics: float) -> Update:
    return Update("single.0", number, 0, 0.0, {"loss": 1.0, **metrics})


def test_nothing_is_sent_without_a_project() -> None:
    assert comet_for(TtrSettings(), "flux") is None
    assert comet_for(TtrSettings(comet_project="  "), "flux") is None


def test_every_nth_update_and_every_measured_one() -> None:
    experiment = Experiment()
    log = CometLog(lambda: experiment)
    log.every = 3
    log.updated([update(number) for number in range(1, 8)] + [update(8, nmse=0.5)], 0)
    log.happened(Occurrence(StudentEvent.CHECKPOINT_SAVED, detail="/a"))
    log.close()
    assert log.join(10.0)
    assert [step for _, step in experiment.metrics] == [3, 6, 8]
    assert experiment.metrics[-1][0] == {"single.0/loss": 1.0, "single.0/nmse": 0.5}
    assert experiment.others == {"checkpoint_saved": "/a"}
    assert experiment.ended


@pytest.mark.parametrize("where", ["open", "log"])
def test_what_fails_at_comet_ends_in_a_warning(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no API key")

    experiment = Experiment()
    experiment.log_metrics = fail  # type: ignore[method-assign]
    log = CometLog(fail if where == "open" else lambda: experiment)
    with caplog.at_level(logging.WARNING, "attnscope"):
        log.updated([update(1), update(2)], 0)
        log.close()
        assert log.join(10.0)
    assert len(caplog.records) == 1
    assert experiment.ended == (where == "log")


def test_what_comet_is_too_slow_for_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    gate, experiment = threading.Event(), Experiment()

    def open_late() -> Experiment:
        assert gate.wait(10.0)
        return experiment

    monkeypatch.setattr(comet, "MOST_WAITING", 5)
    log = CometLog(open_late)
    log.updated([update(number) for number in range(1, 11)], 0)
    log.close()
    gate.set()
    assert log.join(10.0)
    assert len(experiment.metrics) == 4
    assert "6 updates were left out" in caplog.text


@pytest.mark.skipif(find_spec("comet_ml") is None, reason="comet_ml is not installed")
def test_an_offline_experiment_holds_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process of its own: comet_ml changes torch and others where it is imported.
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", SEND], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("messages.json").decode().splitlines()
        about = json.loads(archive.read("experiment.json"))
    assert about["project_name"] == "mine"
    payloads = [json.loads(line)["payload"] for line in lines]
    metrics = [p["metric"] for p in payloads if "metric" in p]
    sent = {
        (m["metricName"], m["step"]): m["metricValue"]
        for m in metrics
        if m["metricName"].startswith("single.0/")
    }
    assert sent == {
        ("single.0/loss", 2): pytest.approx(0.5), ("single.0/loss", 3): pytest.approx(1 / 3),
        ("single.0/nmse", 3): 0.25, ("single.0/loss", 4): 0.25,
    }  # fmt: skip
    others = {p["key"]: p["value"] for p in payloads if "key" in p}
    assert others["model"] == "flux.safetensors"
    assert others["single.0 ready"] == "NMSE 0.01"
