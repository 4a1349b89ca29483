"""The built page and its routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def site(make_api: Any, tmp_path: Path) -> Any:
    page = tmp_path / "dist"
    (page / "assets").mkdir(parents=True)
    (page / "index.html").write_text("<!doctype html><title>AttnScope</title>")
    (page / "assets" / "index-abc123.js").write_text("export {}\n" * 500)
    (page / "favicon.svg").write_text("<svg/>")
    (tmp_path / "secret.txt").write_text("secret")
    return make_api(frontend_dir=page)


def test_files_and_routes_of_the_page(site: Any) -> None:
    for path in ("/", "/runs/abc", "/compare?runs=a,b", "/index.html"):
        response = site.client.get(path)
        assert response.status_code == 200
        assert "<title>AttnScope" in response.text
        assert response.headers["cache-control"] == "no-cache"
    script = site.client.get("/assets/index-abc123.js", headers={"accept-encoding": "gzip"})
    assert "immutable" in script.headers["cache-control"]
    assert script.headers["content-encoding"] == "gzip"
    assert "javascript" in script.headers["content-type"]
    assert site.client.get("/favicon.svg").headers["content-type"].startswith("image/svg")
    assert site.client.head("/").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "/assets/../../secret.txt"],
)
def test_nothing_outside_the_folder_is_served(site: Any, path: str) -> None:
    assert "secret" not in site.client.get(path).text.replace("secret.txt", "")


def test_a_missing_file_is_no_page(site: Any) -> None:
    for path in ("/assets/gone.js", "/app.js", "/api/nowhere"):
        response = site.client.get(path)
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"


def test_without_a_build_the_page_says_how(api: Any) -> None:
    response = api.client.get("/runs/abc")
    assert response.status_code == 200
    assert "npm run build" in response.text


def test_the_description_of_the_api(api: Any) -> None:
    spec = api.get("/openapi.json")
    assert "/api/v1/runs/{run_id}" in spec["paths"]
    page = api.client.get("/api/v1/docs")
    assert "/api/v1/ingest" in page.text
    assert "<script" not in page.text
