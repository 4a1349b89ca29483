"""What this ComfyUI process has of us: the link, its channels, and the runs at work."""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import Config, load_config
from .identity import Place, instance_info, prompt_server
from .images import FinalImages
from .link import Channel, Link
from .run import Run

log = logging.getLogger("attnscope")


def user_folder() -> Path | None:
    """ComfyUI's user folder; None outside ComfyUI."""
    try:
        import folder_paths

        return Path(folder_paths.get_user_directory())
    except Exception:
        return None


def configuration(server_url: str = "") -> Config:
    """The configuration as it is now.

    Raises:
        ConfigError: a value can't be used.
    """
    return load_config(user_folder(), server_url=server_url)


@dataclass
class _Sampled:
    """A run of a prompt whose pictures may still come."""

    node_id: str | None
    run_id: str
    through: bool = False


class Plugin:
    """The one object that outlives runs."""

    def __init__(self, spool_root: Path | None = None) -> None:
        """
        Args:
            spool_root: folder for unsent events; below ComfyUI's user folder by default.
        """
        self.link = Link()
        self._spool_root = spool_root
        self._lock = threading.Lock()
        self._channels: dict[tuple[str, str], Channel] = {}
        self._active: list[Run] = []
        self._prompts: dict[str, list[_Sampled]] = {}

    def channel(self, config: Config, device: torch.device | None = None) -> Channel:
        """The channel to a server; the same one for the same address."""
        key = (config.url, config.token)
        with self._lock:
            known = self._channels.get(key)
        instance = instance_info(device).model_dump(mode="json")
        if known is not None:
            known.instance.update(instance)
            return known
        with self._lock:
            if key not in self._channels:
                channel = Channel(config, instance, self._root(), self.link)
                self._channels[key] = channel
                self.link.add(channel)
            return self._channels[key]

    def begin(self, run: Run, channel: Channel | None, place: Place) -> None:
        """A run is at work from now on."""
        with self._lock:
            self._active.append(run)
            if place.prompt_id is not None:
                self._prompts.setdefault(place.prompt_id, []).append(
                    _Sampled(place.node_id, run.run_id)
                )
        if channel is not None:
            channel.runs[run.run_id] = run
            self._show(channel, run, place, live=True)

    def end(self, run: Run, channel: Channel | None, place: Place, completed: bool) -> None:
        """A run is over. Finished pictures are still to come where it has completed."""
        run_id = run.run_id
        with self._lock, contextlib.suppress(ValueError):
            self._active.remove(run)
        if channel is None:
            self._forget(run_id, place)
            return
        if completed and place.prompt_id is not None and prompt_server() is not None:
            finals = FinalImages(
                run_id, place, lambda: self._siblings(run_id, place), channel.outbox.put
            )

            async def chore() -> None:
                try:
                    await finals.run()
                finally:
                    self._forget(run_id, place)

            channel.chores.append(chore)
        else:
            self._forget(run_id, place)
        channel.runs.pop(run.run_id, None)
        self._show(channel, run, place, live=False)
        self.link.ensure()

    def interrupt(self, run: Run) -> None:
        """Stop ComfyUI's sampling if ``run`` is what it samples now."""
        with self._lock:
            current = self._active[-1] if self._active else None
        if current is not run:
            return
        import comfy.model_management

        comfy.model_management.interrupt_current_processing()

    def resume(self) -> None:
        """Send what an earlier process has left, if it has left anything."""
        from .spool import left_over

        config = configuration()
        root = self._root()
        if not config.disabled and root is not None and left_over(root, config.url):
            self.channel(config)
            self.link.ensure()

    def _siblings(self, run_id: str, place: Place) -> tuple[int, int, set[str]]:
        with self._lock:
            runs = list(self._prompts.get(place.prompt_id or "", ()))
        same = [other.run_id for other in runs if other.node_id == place.node_id]
        samplers = {other.node_id for other in runs if other.node_id is not None}
        index = same.index(run_id) if run_id in same else 0
        return index, max(1, len(same)), samplers

    def _forget(self, run_id: str, place: Place) -> None:
        with self._lock:
            runs = self._prompts.get(place.prompt_id or "", [])
            for other in runs:
                other.through = other.through or other.run_id == run_id
            # Siblings need the whole list until each of them is through.
            if all(other.through for other in runs):
                self._prompts.pop(place.prompt_id or "", None)

    def _root(self) -> Path | None:
        if self._spool_root is not None:
            return self._spool_root
        folder = user_folder()
        return folder / "attnscope" / "spool" if folder is not None else None

    def _show(self, channel: Channel, run: Run, place: Place, live: bool) -> None:
        """Tell ComfyUI's own page, which marks our nodes."""
        server = prompt_server()
        if server is None or place.node_id is None:
            return
        message: dict[str, Any] = {
            "run_id": run.run_id,
            "url": channel.config.url,
            "live": live,
            "node_ids": our_nodes_above(place),
        }
        with contextlib.suppress(Exception):
            server.send_sync("attnscope.run", message)


def our_nodes_above(place: Place) -> list[str]:
    """Ids of our own nodes that the sampler's model comes through."""
    found: list[str] = []
    queue = [str(place.node_id)]
    seen: set[str] = set()
    while queue and len(seen) < 500:
        node_id = queue.pop(0)
        if node_id in seen:
            continue
        seen.add(node_id)
        node = (place.graph or {}).get(node_id) or {}
        if str(node.get("class_type", "")).startswith("AttnScope"):
            found.append(node_id)
        for value in place.inputs(node_id).values():
            if isinstance(value, list) and len(value) == 2:
                queue.append(str(value[0]))
    return found


_plugin: Plugin | None = None
_plugin_lock = threading.Lock()


def get_plugin() -> Plugin:
    """The process's plugin, made on first use."""
    global _plugin
    with _plugin_lock:
        if _plugin is None:
            _plugin = Plugin()
        return _plugin
