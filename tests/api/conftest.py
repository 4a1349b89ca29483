"""What the tests of the server share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support import events
from support.server import ServerProcess

from attnscope.backend.app import create_app
from attnscope.backend.config import Config
from attnscope.backend.services import Services
from attnscope.db import migrate
from attnscope.db.session import Store

BASE = "/api/v1"


class Api:
    """A client of an application, and a plugin that hands in events."""

    def __init__(self, client: TestClient, services: Services) -> None:
        self.client = client
        self.services = services
        self.instance = events.instance()

    def send(self, *items: Any, instance: Any = None) -> Any:
        """Hand in events; the answer must be 200."""
        response = self.post(*items, instance=instance)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, *items: Any, instance: Any = None) -> Any:
        """Hand in events."""
        data = events.batch_json(instance or self.instance, *items)
        return self.client.post(
            f"{BASE}/ingest", content=data, headers={"content-type": "application/json"}
        )

    def get(self, path: str, **params: Any) -> Any:
        """Read something; the answer must be 200."""
        response = self.client.get(BASE + path, params=params)
        assert response.status_code == 200, response.text
        return response.json()

    def problem(self, method: str, path: str, status: int, **more: Any) -> Any:
        """A request that is refused; the answer must be a problem."""
        response = self.client.request(method, BASE + path, **more)
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["status"] == status
        return problem


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the newest schema and nothing in it, made once and copied."""
    folder = tmp_path_factory.mktemp("template")
    store = Store(f"sqlite:///{folder / 'attnscope.db'}")
    migrate.upgrade(store)
    store.close()
    return folder / "attnscope.db"


@pytest.fixture
def make_api(tmp_path: Path, empty_database: Path) -> Iterator[Any]:
    """Makes applications; each is closed after the test."""
    opened: list[TestClient] = []

    def make(folder: str = "data", raise_errors: bool = True, **options: Any) -> Api:
        options.setdefault("data_dir", tmp_path / folder)
        options.setdefault("frontend_dir", tmp_path / "no-page")
        file = options["data_dir"] / "attnscope.db"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(empty_database, file)
        app = create_app(Config(**options))
        client = TestClient(
            app, base_url="http://127.0.0.1:8420", raise_server_exceptions=raise_errors
        )
        client.__enter__()
        opened.append(client)
        return Api(client, app.state.services)

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def api(make_api: Any) -> Api:
    """An application with an empty database."""
    made: Api = make_api()
    return made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A real server with an empty database."""
    with ServerProcess(tmp_path / "data") as process:
        yield process
