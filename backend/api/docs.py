"""The API's own description, as JSON and for reading."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

router = APIRouter(tags=["docs"], include_in_schema=False)


@router.get("/openapi.json")
def openapi_json(request: Request) -> Response:
    """The OpenAPI document."""
    return JSONResponse(request.app.openapi())


@router.get("/docs")
def reader(request: Request) -> Response:
    """The document as a page of its own: no script, and nothing from another machine."""
    spec: dict[str, Any] = request.app.openapi()
    rows = []
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            rows.append(_operation(path, method, operation))
    body = "\n".join(rows)
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8><title>AttnScope HTTP API</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem;"
        "color-scheme:light dark}code{font:14px ui-monospace,monospace}"
        "section{border-top:1px solid #8886;padding:.5rem 0}</style>"
        f"<h1>AttnScope HTTP API {escape(spec['info']['version'])}</h1>"
        "<p>The whole description: <a href=openapi.json>openapi.json</a></p>"
        f"{body}</html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parameters = "".join(
        f"<li><code>{escape(item['name'])}</code> ({escape(item['in'])}) "
        f"{escape(item.get('description', ''))}</li>"
        for item in operation.get("parameters", [])
    )
    return (
        f"<section><h2><code>{method.upper()} {escape(path)}</code></h2>"
        f"<p>{escape(operation.get('description', ''))}</p><ul>{parameters}</ul></section>"
    )
