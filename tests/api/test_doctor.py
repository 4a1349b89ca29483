"""The doctor finds what is wrong, and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnscope.backend import cli, doctor
from attnscope.backend.config import Config


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "custom_nodes").mkdir()
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text('__version__ = "0.3.75"\n')
    return folder


def by_name(checks: Any) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def no_torch_probe(monkeypatch: Any) -> None:
    found = {"python": "python", "torch": "2.13", "triton": "3.5"}
    monkeypatch.setattr(doctor, "probe_torch", lambda _: found)


def test_a_whole_installation(tmp_path: Path, comfyui: Path, no_torch_probe: None) -> None:
    (comfyui / "custom_nodes" / "attnscope").symlink_to(doctor.ROOT)
    config = Config(data_dir=tmp_path / "data", port=1)
    checks = by_name(doctor.examine(config, {"COMFYUI_DIR": str(comfyui)}))
    assert list(checks) == [
        "python", "configuration", "database", "page", "server", "comfyui", "plugin", "torch",
        "gpu", "triton",
    ]  # fmt: skip
    assert not [check for check in checks.values() if check.state == "fail"]
    assert "0.3.75" in checks["comfyui"].found
    assert checks["plugin"].state == "ok"
    assert checks["server"].state == "warn" and "attnscope serve" in checks["server"].remedy
    assert checks["gpu"].state == "warn"
    assert all(check.remedy for check in checks.values() if check.state != "ok")


def test_what_is_wrong_fails(
    tmp_path: Path, comfyui: Path, no_torch_probe: None, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("COMFYUI_DIR", str(comfyui))
    data = ["--data-dir", str(tmp_path / "data")]
    assert cli.main(["doctor", *data]) == 1
    said = capsys.readouterr().out
    assert "fail  plugin: not in" in said
    assert "→ ln -s" in said
    assert cli.main(["doctor", "--json", *data]) == 1
    found = {c["name"]: c["state"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert found["plugin"] == "fail" and found["comfyui"] == "ok"
    (comfyui / "custom_nodes" / "attnscope").symlink_to(doctor.ROOT)
    assert cli.main(["doctor", *data]) == 0
    (comfyui / "custom_nodes" / "attnscope2").symlink_to(doctor.ROOT)
    assert cli.main(["doctor", *data]) == 1
    assert "more than once" in capsys.readouterr().out
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path / "nowhere"))
    assert cli.main(["doctor", *data]) == 1


def test_a_broken_database_fails(tmp_path: Path) -> None:
    (tmp_path / "attnscope.db").write_bytes(b"this is no database" * 100)
    check = doctor.check_database(Config(data_dir=tmp_path))
    assert check.state == "fail" and check.remedy


def test_a_server_of_this_version_is_found(server: Any) -> None:
    assert doctor.check_server(server.url).state == "ok"


def test_torch_is_probed_in_another_process() -> None:
    import sys

    found = doctor.probe_torch(None)
    assert found["python"] == sys.executable
    assert doctor.check_torch({"error": "gone", "python": "x"})[0].state == "warn"


def test_the_server_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, attnscope.backend.cli, attnscope.backend.app; "
        "assert 'torch' not in sys.modules and 'plotly' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
