"""Where the configuration comes from, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from attnscope.comfy_plugin.config import Config, ConfigError, load_config


def test_defaults() -> None:
    assert load_config(None, environment={}) == Config()
    assert Config().url == "http://127.0.0.1:8420"


def test_the_node_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "attnscope.json").write_text(
        json.dumps({"url": "http://file:1/", "token": "file", "spool_mb": 2})
    )
    config = load_config(tmp_path, environment={})
    assert (config.url, config.token, config.spool_bytes) == ("http://file:1", "file", 2 * 2**20)
    named = {"ATTNSCOPE_URL": "https://environment", "ATTNSCOPE_TOKEN": "t"}
    config = load_config(tmp_path, environment=named)
    assert (config.url, config.token) == ("https://environment", "t")
    config = load_config(tmp_path, environment=named, server_url="http://node:9")
    assert config.url == "http://node:9"


def test_a_token_never_goes_to_an_address_that_a_workflow_names() -> None:
    environment = {"ATTNSCOPE_URL": "http://mine:1", "ATTNSCOPE_TOKEN": "secret"}
    assert load_config(None, environment=environment, server_url="http://mine:1/").token
    assert not load_config(None, environment=environment, server_url="http://other:1").token


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
def test_toml(tmp_path: Path) -> None:
    (tmp_path / "attnscope.toml").write_text('url = "http://toml:5"\ndisabled = true\n')
    config = load_config(tmp_path, environment={})
    assert config.url == "http://toml:5"
    assert config.disabled


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"ATTNSCOPE_URL": "ftp://x"}, ["ATTNSCOPE_URL", "'ftp://x'", "allowed"]),
        ({"ATTNSCOPE_URL": "http://"}, ["ATTNSCOPE_URL", "allowed"]),
        ({"ATTNSCOPE_URL": "http://h:99999"}, ["ATTNSCOPE_URL", "allowed"]),
        ({"ATTNSCOPE_URL": "http://h/?q=1"}, ["ATTNSCOPE_URL", "allowed"]),
        ({"ATTNSCOPE_DISABLE": "perhaps"}, ["ATTNSCOPE_DISABLE", "'perhaps'", "1 or 0"]),
        ({"ATTNSCOPE_SPOOL_MB": "-4"}, ["ATTNSCOPE_SPOOL_MB", "'-4'", "from 1"]),
        ({"ATTNSCOPE_LINGER_S": "soon"}, ["ATTNSCOPE_LINGER_S", "'soon'"]),
    ],
)
def test_bad_values_are_named(environment: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, environment=environment)
    assert all(part in str(error.value) for part in parts)


def test_a_token_is_never_repeated_in_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, environment={"ATTNSCOPE_TOKEN": "se\ncret"})
    assert "cret" not in str(error.value)


def test_a_bad_address_on_the_node_is_named() -> None:
    with pytest.raises(ConfigError, match="server_url: is 'nowhere'"):
        load_config(None, environment={}, server_url="nowhere")


@pytest.mark.parametrize(
    ("text", "part"),
    [("{", "can't be read"), ("[]", "no table"), ('{"uri": 1}', "unknown field 'uri'")],
)
def test_bad_files_are_named(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "attnscope.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path, environment={})
    assert part in str(error.value)
    assert "attnscope.json" in str(error.value)
