"""Where the plugin sends to, and how much it may keep: node, environment, configuration file.

The node's own address comes first, then the environment (ATTNSCOPE_URL, ATTNSCOPE_TOKEN,
ATTNSCOPE_DISABLE), then ``attnscope.toml`` or ``attnscope.json`` in ComfyUI's user folder, then
the defaults. A token goes only to the address that it was configured for: a workflow from
elsewhere can name any address, and must not get it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_URL = "http://127.0.0.1:8420"

FILE_NAMES = ("attnscope.toml", "attnscope.json")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


class ConfigError(ValueError):
    """A value that can't be used; the message names the field, the value and what is allowed."""


@dataclass(frozen=True)
class Config:
    """How this ComfyUI talks to the server.

    Attributes:
        url: address of the server, without a slash at its end.
        token: sent as bearer token; empty where the server wants none.
        disabled: whether nothing at all is recorded and sent.
        spool_bytes: bound of the unsent events on disk.
        queue_events: bound of the events that wait in memory for the link's thread.
        linger_s: seconds after the last run for which unsent events are still tried.
        log_steps: whether each step and run is summed up in one line of ComfyUI's log.
    """

    url: str = DEFAULT_URL
    token: str = ""
    disabled: bool = False
    spool_bytes: int = 256 * 2**20
    queue_events: int = 4096
    linger_s: float = 60.0
    log_steps: bool = True


def _address(field: str, value: Any) -> str:
    text = str(value).strip().rstrip("/")
    try:
        parts = urlsplit(text)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        ok = ok and not parts.query and not parts.fragment
    except ValueError:
        ok = False
    if not ok:
        raise ConfigError(
            f"{field}: is {value!r}; allowed: an address such as {DEFAULT_URL} or https://host"
        )
    return text


def _flag(field: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigError(f"{field}: is {value!r}; allowed: 1 or 0")


def _number(field: str, value: Any, least: float, most: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not least <= number <= most:
        raise ConfigError(f"{field}: is {value!r}; allowed: a number from {least:g} to {most:g}")
    return number


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or any(ord(letter) < 32 for letter in value):
        raise ConfigError(f"{field}: is not plain text; allowed: one line of text")
    return value.strip()


def _apply(config: Config, values: Mapping[str, Any], names: Mapping[str, str]) -> Config:
    changes: dict[str, Any] = {}
    for key, value in values.items():
        field = names[key]
        if key == "url":
            changes["url"] = _address(field, value)
        elif key == "token":
            changes["token"] = _text(field, value)
        elif key == "disabled":
            changes["disabled"] = _flag(field, value)
        elif key == "spool_mb":
            changes["spool_bytes"] = int(_number(field, value, 1, 1_000_000) * 2**20)
        elif key == "linger_s":
            changes["linger_s"] = _number(field, value, 0, 86_400)
        elif key == "log_steps":
            changes["log_steps"] = _flag(field, value)
    return replace(config, **changes)


FILE_KEYS = ("url", "token", "disabled", "spool_mb", "linger_s", "log_steps")

ENVIRONMENT = {
    "url": "ATTNSCOPE_URL",
    "token": "ATTNSCOPE_TOKEN",
    "disabled": "ATTNSCOPE_DISABLE",
    "spool_mb": "ATTNSCOPE_SPOOL_MB",
    "linger_s": "ATTNSCOPE_LINGER_S",
    "log_steps": "ATTNSCOPE_LOG_STEPS",
}


def read_file(path: Path) -> dict[str, Any]:
    """The values of a configuration file.

    Raises:
        ConfigError: it can't be read, or names a field that there is not.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            try:
                import tomllib
            except ModuleNotFoundError:
                raise ConfigError(
                    f"{path}: TOML needs Python 3.11; allowed here: {FILE_NAMES[1]}"
                ) from None
            values = tomllib.loads(text)
        else:
            values = json.loads(text)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: can't be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is no table; allowed: {', '.join(FILE_KEYS)}")
    for key in values:
        if key not in FILE_KEYS:
            raise ConfigError(f"{path}: unknown field {key!r}; allowed: {', '.join(FILE_KEYS)}")
    return values


def load_config(
    user_folder: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    server_url: str = "",
) -> Config:
    """Put the sources together.

    Args:
        user_folder: ComfyUI's user folder; None where there is none.
        environment: of the process, by default.
        server_url: the node's; empty leaves the address to the other sources.

    Raises:
        ConfigError: a source holds a value that can't be used.
    """
    environment = os.environ if environment is None else environment
    config = Config()
    files = [Path(user_folder) / name for name in FILE_NAMES] if user_folder is not None else []
    for path in files:
        if path.is_file():
            values = read_file(path)
            config = _apply(config, values, {key: f"{path}: {key}" for key in values})
            break
    named = {
        key: environment[variable]
        for key, variable in ENVIRONMENT.items()
        if environment.get(variable, "").strip()
    }
    config = _apply(config, named, ENVIRONMENT)
    if server_url.strip():
        address = _address("server_url", server_url)
        if address != config.url:
            config = replace(config, url=address, token="")
    return config
