"""The server's settings: command line > environment ``ATTNSCOPE_*`` > TOML file > default."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib
from pydantic import BaseModel, ConfigDict, Field, ValidationError

PREFIX = "ATTNSCOPE_"
SECRETS = frozenset({"token", "read_token"})
MIB = 1024 * 1024


class ConfigError(Exception):
    """The configuration can't be used; the message is one sentence for the user."""


def default_data_dir() -> Path:
    """Folder for database and images where nothing else was chosen."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "attnscope"


class Config(BaseModel):
    """Everything that can be set about the server. Read once, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8420, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    data_dir: Path = Field(
        default_factory=default_data_dir, description="folder of database and images"
    )
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite in data_dir")
    frontend_dir: Path | None = Field(None, description="built page; none: frontend/dist")
    token: str = Field("", description="token that may read, steer and ingest")
    read_token: str = Field("", description="token that may only read")
    allowed_hosts: tuple[str, ...] = Field((), description="host names the server answers to")
    allowed_origins: tuple[str, ...] = Field(
        (), description="origins besides its own that may change things"
    )
    max_body: int = Field(16 * MIB, ge=1024, description="bytes of a request body as sent")
    max_unpacked: int = Field(64 * MIB, ge=1024, description="bytes of a body after gunzip")
    max_image: int = Field(8 * MIB, ge=1024, description="bytes of one image")
    max_image_side: int = Field(8192, ge=1, description="pixels of an image's longer side")
    lost_after: float = Field(60.0, gt=0, description="seconds of silence that make a run lost")
    sweep_every: float = Field(5.0, gt=0, description="seconds between looks for lost runs")
    ping_every: float = Field(15.0, gt=0, description="seconds between pings in a stream")
    busy_timeout: float = Field(5.0, ge=0, description="seconds to wait for a locked database")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'attnscope.db').absolute()}"

    @property
    def images_dir(self) -> Path:
        """Folder of the image files."""
        return self.data_dir / "images"

    @property
    def page_dir(self) -> Path:
        """Folder of the built page."""
        return self.frontend_dir or Path(__file__).resolve().parent.parent / "frontend" / "dist"

    @property
    def loopback(self) -> bool:
        """Whether the server can be reached from this machine only."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Refuse what would be unsafe.

        Raises:
            ConfigError: bound to an outside address without a token.
        """
        if not self.loopback and not self.token:
            raise ConfigError(
                f"host {self.host!r} can be reached from other machines, so a token is needed: "
                "set ATTNSCOPE_TOKEN (and ATTNSCOPE_READ_TOKEN for viewers), or use 127.0.0.1."
            )
        if self.read_token and not self.token:
            raise ConfigError("ATTNSCOPE_READ_TOKEN needs ATTNSCOPE_TOKEN beside it.")
        if self.token and self.token == self.read_token:
            raise ConfigError("ATTNSCOPE_TOKEN and ATTNSCOPE_READ_TOKEN must differ.")


def is_loopback(host: str) -> bool:
    """Whether an address or name stands for this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def load(
    cli: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Put the configuration together.

    Args:
        cli: options given on the command line; those that are None count as not given.
        environ: environment; the process's own where left out.
        file: TOML file; otherwise ``ATTNSCOPE_CONFIG``, otherwise none.

    Raises:
        ConfigError: a source can't be read or holds a value that is not allowed.
    """
    environ = os.environ if environ is None else environ
    named = environ.get(f"{PREFIX}CONFIG")
    path = file or (Path(named) if named else None)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if path is not None:
        layers.append((str(path), _read_toml(path)))
    layers.append(("environment", _from_environment(environ)))
    layers.append(("command line", {k: v for k, v in (cli or {}).items() if v is not None}))
    for source, layer in layers:
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        shown = "" if name in SECRETS else f" {first['input']!r}"
        raise ConfigError(f"{sources.get(name)}: {name}{shown}: {first['msg']}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in Config.model_fields:
        text = environ.get(PREFIX + name.upper())
        if text is None:
            continue
        is_list = name in ("allowed_hosts", "allowed_origins")
        values[name] = (
            [part.strip() for part in text.split(",") if part.strip()] if is_list else text
        )
    return values
