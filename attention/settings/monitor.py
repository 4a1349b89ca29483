"""Settings of the monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import field_validator

from ..selection import LAYERS_ALLOWED, STEPS_ALLOWED, Layers, Steps
from .base import Group, Measured, setting


def _readable(name: str, text: str, parse: Callable[[str], Any], allowed: str) -> str:
    """The text, if its parser takes it."""
    try:
        parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; allowed: {allowed}") from None
    return text.strip()


class MonitorSettings(Measured):
    """Exact attention, watched: timing and q·k statistics, nothing changed."""

    capture_layers: str = setting(
        "",
        Group.CAPTURE,
        "Layers whose query, key and value are written to attnscope-captures in ComfyUI's output "
        "folder, for attnscope evaluate: single.3, double.0-5, single or all, with commas between "
        "them. Empty writes nothing.",
        live=False,
        max_length=400,
    )
    capture_steps: str = setting(
        "all",
        Group.CAPTURE,
        "Steps at which they are written, counted from 0: 0,5,10-12 or all.",
        live=False,
        max_length=400,
    )
    capture_max_mb: int = setting(
        1024,
        Group.CAPTURE,
        "Most that one run writes. Capture ends before the call that would exceed it.",
        unit="MB",
        live=False,
        ge=1,
        le=1_000_000,
    )

    @field_validator("capture_layers")
    @classmethod
    def _layers(cls, text: str) -> str:
        return _readable("capture_layers", text, Layers.parse, LAYERS_ALLOWED)

    @field_validator("capture_steps")
    @classmethod
    def _steps(cls, text: str) -> str:
        return _readable("capture_steps", text, Steps.parse, STEPS_ALLOWED)
