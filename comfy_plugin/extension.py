"""Our nodes, as ComfyUI's extension API wants them."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from .identity import prompt_server
from .nodes.backends import (
    HybridNode,
    MonitorNode,
    RouterNode,
    TaylorNode,
    TiledNode,
    TtrNode,
)
from .plugin import configuration, get_plugin

log = logging.getLogger("attnscope")


class AttnScopeExtension(ComfyExtension):
    """AttnScope's part of a ComfyUI."""

    async def on_load(self) -> None:
        prepare()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Versions of ComfyUI that don't call on_load still ask for the nodes.
        prepare()
        return [
            TaylorNode,
            HybridNode,
            TiledNode,
            TtrNode,
            RouterNode,
            MonitorNode,
            *_demo_nodes(),
        ]


def _demo_nodes() -> list[type[io.ComfyNode]]:
    try:
        from .demo.nodes import DEMO_NODES
    except Exception:
        log.warning("AttnScope: the demo's nodes can't be loaded", exc_info=True)
        return []
    return list(DEMO_NODES)


_prepared = False


def prepare() -> None:
    """Once per process: tell the page where the dashboard is, and send what was left unsent."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    try:
        _add_route()
        get_plugin().resume()
    except Exception:
        log.warning("AttnScope: preparations failed", exc_info=True)


def _add_route() -> None:
    server = prompt_server()
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/attnscope/config")
    async def config(_: web.Request) -> web.Response:
        try:
            current = configuration()
        except ValueError as error:
            return web.json_response({"url": None, "error": str(error)})
        return web.json_response({"url": current.url, "disabled": current.disabled})
