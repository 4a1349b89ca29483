"""Who may do what, from where."""

from __future__ import annotations

from typing import Any

import pytest
from support.events import RunScript, batch_json

from attnscope.backend import cli
from attnscope.backend.config import Config, ConfigError, load

TOKEN, READ = "steer-secret", "read-secret"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def guarded(make_api: Any) -> Any:
    return make_api(token=TOKEN, read_token=READ)


def test_without_tokens_everything_is_open_on_loopback(api: Any) -> None:
    assert api.get("/session") == {"required": False, "may_read": True, "may_steer": True}
    assert api.get("/runs")["total"] == 0


def test_reading_and_steering_take_different_tokens(guarded: Any) -> None:
    data = batch_json(guarded.instance, RunScript().started())
    assert guarded.problem("GET", "/runs", 401)["type"] == "unauthorized"
    assert guarded.problem("GET", "/stream", 401)
    assert guarded.problem("GET", "/openapi.json", 401)
    assert guarded.problem("GET", "/runs", 401, headers=bearer("wrong"))
    assert guarded.problem("POST", "/ingest", 401, content=data)
    assert guarded.problem("POST", "/ingest", 403, content=data, headers=bearer(READ))
    get = guarded.client.get
    assert get("/api/v1/runs", headers=bearer(READ)).status_code == 200
    assert get("/api/v1/runs", headers=bearer(TOKEN)).status_code == 200
    sent = guarded.client.post("/api/v1/ingest", content=data, headers=bearer(TOKEN))
    assert sent.status_code == 200
    mailbox = f"/instances/{guarded.instance.instance_id}/mailbox"
    assert guarded.problem("GET", mailbox, 403, headers=bearer(READ))
    run = get("/api/v1/runs", headers=bearer(READ)).json()["items"][0]["run_id"]
    for method, path, body in (
        ("PUT", f"/runs/{run}/settings", {"base_revision": 0, "settings": {}}),
        ("POST", f"/runs/{run}/interrupt", None),
        ("PATCH", f"/runs/{run}", {"label": "x"}),
        ("DELETE", f"/runs/{run}", None),
        ("PUT", f"/instances/{guarded.instance.instance_id}/settings/taylor", {"settings": {}}),
    ):
        assert guarded.problem(method, path, 403, json=body, headers=bearer(READ))
        assert guarded.problem(method, path, 401, json=body)
    assert guarded.client.get("/api/v1/health").status_code == 200


@pytest.mark.parametrize(("token", "steer"), [(TOKEN, True), (READ, False)])
def test_a_browser_logs_in_and_out(guarded: Any, token: str, steer: bool) -> None:
    assert guarded.get("/session") == {"required": True, "may_read": False, "may_steer": False}
    assert guarded.problem("POST", "/session", 401, json={"token": "wrong"})
    answer = guarded.client.post("/api/v1/session", json={"token": token})
    assert answer.json() == {"required": True, "may_read": True, "may_steer": steer}
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie
    assert token not in cookie
    assert guarded.get("/runs")["total"] == 0
    run = "0" * 32
    expected = 404 if steer else 403
    assert guarded.problem("DELETE", f"/runs/{run}", expected)
    assert guarded.client.delete("/api/v1/session").status_code == 204
    assert guarded.problem("GET", "/runs", 401)


def test_a_forged_or_outdated_cookie_is_worth_nothing(guarded: Any, make_api: Any) -> None:
    answer = guarded.client.post("/api/v1/session", json={"token": READ})
    value = answer.headers["set-cookie"].split(";")[0].split("=", 1)[1]
    role, expires, signature = value.split(".")
    for forged in (
        f"steer.{expires}.{signature}",
        f"{role}.{int(expires) + 1}.{signature}",
        f"{role}.{expires}.{'0' * 64}",
        "read..",
        "",
        "é",
    ):
        guarded.client.cookies.clear()
        header = {"cookie": f"attnscope_session={forged}".encode("latin-1")}
        assert guarded.problem("GET", "/runs", 401, headers=header)
    other = make_api("other", token="another", read_token="another-read")
    assert other.problem("GET", "/runs", 401, headers={"cookie": f"attnscope_session={value}"})


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("127.0.0.1:8420", True),
        ("localhost:8420", True),
        ("[::1]:8420", True),
        ("LOCALHOST", True),
        ("evil.example", False),
        ("evil.example:8420", False),
        ("127.0.0.1.evil.example", False),
        ("localhost@evil.example", False),
        ("10.0.0.7:8420", False),
        ("", False),
    ],
)
def test_only_its_own_names_are_served(api: Any, host: str, served: bool) -> None:
    response = api.client.get("/api/v1/health", headers={"host": host})
    assert response.status_code == (200 if served else 421)
    page = api.client.get("/", headers={"host": host})
    assert page.status_code == (200 if served else 421)


def test_names_and_addresses_that_were_configured_are_served(make_api: Any) -> None:
    api = make_api(host="0.0.0.0", token=TOKEN, allowed_hosts=("gpu.lan",))
    for host, status in (("gpu.lan:8420", 200), ("10.0.0.7:8420", 200), ("evil.example", 421)):
        assert api.client.get("/api/v1/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"origin": "http://127.0.0.1:8420"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"origin": "null"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-origin"}, True),
    ],
)
def test_another_page_can_change_nothing(api: Any, headers: dict[str, str], allowed: bool) -> None:
    script = RunScript()
    api.send(script.started())
    path = f"/api/v1/runs/{script.run_id}"
    response = api.client.patch(path, json={"label": "x"}, headers=headers)
    assert response.status_code == (200 if allowed else 403)
    assert api.client.get(path, headers=headers).status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_a_configured_origin_may_change_things(make_api: Any) -> None:
    api = make_api(allowed_origins=("http://localhost:5173",))
    response = api.client.post(
        "/api/v1/session", json={"token": ""}, headers={"origin": "http://localhost:5173"}
    )
    assert response.status_code == 200


def test_headers_of_every_answer(api: Any) -> None:
    for path in ("/", "/api/v1/health", "/api/v1/nowhere"):
        headers = api.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe-eval" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_an_unforeseen_error_keeps_its_trace_to_itself(
    make_api: Any, monkeypatch: Any, caplog: Any
) -> None:
    api = make_api(raise_errors=False)

    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("attnscope.backend.api.runs.runs.page", fail)
    problem = api.problem("GET", "/runs", 500)
    assert problem["type"] == "internal-error"
    assert "secret" not in str(problem)
    assert "secret detail" in caplog.text


def test_an_outside_address_needs_a_token(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("ATTNSCOPE_TOKEN", raising=False)
    assert cli.main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 1
    said = capsys.readouterr().err
    assert "ATTNSCOPE_TOKEN" in said and "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    for host in ("0.0.0.0", "::", "192.168.1.4", "gpu.lan"):
        with pytest.raises(ConfigError):
            Config(host=host).check()
        Config(host=host, token="x").check()
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        Config(host=host).check()
    with pytest.raises(ConfigError, match="differ"):
        Config(token="same", read_token="same").check()
    with pytest.raises(ConfigError, match="beside"):
        Config(read_token="x").check()


def test_configuration_by_order_of_its_sources(tmp_path: Any) -> None:
    file = tmp_path / "attnscope.toml"
    file.write_text('port = 1\nhost = "localhost"\nlost_after = 9\nallowed_hosts = ["a"]\n')
    environ = {"ATTNSCOPE_PORT": "2", "ATTNSCOPE_LOST_AFTER": "8", "ATTNSCOPE_CONFIG": str(file)}
    config = load({"port": 3, "host": None}, environ)
    assert (config.port, config.lost_after, config.host) == (3, 8, "localhost")
    assert config.allowed_hosts == ("a",)
    assert load({}, {"ATTNSCOPE_ALLOWED_HOSTS": "a, b"}).allowed_hosts == ("a", "b")
    with pytest.raises(ConfigError, match="environment: port 'x'"):
        load({}, {"ATTNSCOPE_PORT": "x"})
    with pytest.raises(ConfigError, match="command line: port 70000"):
        load({"port": 70000}, {})
    file.write_text("colour = 1\n")
    with pytest.raises(ConfigError, match="colour"):
        load({}, {}, file)
    file.write_text("=")
    with pytest.raises(ConfigError, match="configuration file"):
        load({}, {}, file)
    with pytest.raises(ConfigError, match="token:") as error:
        load({"token": 5}, {})
    assert "5" not in str(error.value), "a token is never shown"
