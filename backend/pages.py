"""The built page: files as they are, and its entry for every path of its own router."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from . import problems
from .services import ServicesDep

router = APIRouter(include_in_schema=False)

FOREVER = "public, max-age=31536000, immutable"
ASK_FIRST = "no-cache"
NOT_BUILT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>AttnScope</title>
<style>body{font:16px/1.6 system-ui;max-width:40rem;margin:4rem auto;padding:0 1rem;
color-scheme:light dark}code{font:14px ui-monospace,monospace}</style>
<h1>The page is not built yet</h1>
<p>The server runs; its HTTP API is described at <a href="/api/v1/docs">/api/v1/docs</a>.</p>
<p>Build the page with <code>cd frontend &amp;&amp; npm ci &amp;&amp; npm run build</code>
(<code>make run</code> does it for you) and load this again.</p></html>"""


@router.api_route("/{path:path}", methods=["GET", "HEAD"])
def page(path: str, request: Request, services: ServicesDep) -> Response:
    """A file of the page, or the page itself for its own routes."""
    if path.startswith("api/"):
        raise problems.not_found("path", "/" + path[:200])
    root = services.config.page_dir.resolve()
    index = root / "index.html"
    if not index.is_file():
        return HTMLResponse(NOT_BUILT, headers={"Cache-Control": "no-store"})
    wanted = _inside(root, path)
    if wanted is not None and wanted.is_file():
        hashed = wanted.parent.name == "assets"
        return FileResponse(wanted, headers={"Cache-Control": FOREVER if hashed else ASK_FIRST})
    if path.startswith("assets/") or Path(path).suffix in (".js", ".css", ".map", ".json", ".ico"):
        # the page as a script would be a puzzling error in the browser
        raise problems.not_found("file", "/" + path[:200])
    return FileResponse(index, headers={"Cache-Control": ASK_FIRST})


def _inside(root: Path, path: str) -> Path | None:
    if not path or "\0" in path:
        return None
    wanted = (root / path).resolve()
    return wanted if wanted.is_relative_to(root) else None
