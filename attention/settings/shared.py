"""Settings that several variants have, each defined once.

Functions and not base classes: a form's order is that of the fields of its class, and a variant's
names can have the variant's own prefix.
"""

from __future__ import annotations

from typing import Any

from .base import Group, setting


def enabled_setting() -> Any:
    """Whether the variant runs at all."""
    return setting(True, Group.GATE, "Off runs exact attention everywhere.")


def min_tokens_setting(default: int, help: str, least: int = 0) -> Any:
    """The least tokens of a call; ``least`` is -1 where a variant can choose by itself."""
    return setting(default, Group.GATE, help, unit="tokens", ge=least, le=1_000_000, step=1)


def sigma_max_setting(more: str = "") -> Any:
    """The greatest sigma, with more help where a variant has more to say."""
    return setting(
        0.0,
        Group.GATE,
        "Run only at steps whose sigma is at most this. 0 sets no limit." + more,
        title="sigma max",
        unit="sigma",
        ge=0.0,
        le=1000.0,
        step=0.01,
    )


def layer_start_setting() -> Any:
    """The first block."""
    return setting(
        -1,
        Group.GATE,
        "First block index at which to run, counted within its block type. -1 sets no limit.",
        title="layer start",
        unit="block",
        ge=-1,
        le=999,
    )


def layer_end_setting() -> Any:
    """The last block."""
    return setting(
        -1,
        Group.GATE,
        "Last block index at which to run, inclusive. -1 sets no limit.",
        title="layer end",
        unit="block",
        ge=-1,
        le=999,
    )


def block_type_setting() -> Any:
    """The kind of block: of type ``Literal["all", "double", "single"]``."""
    return setting("all", Group.GATE, "Kind of block in which to run.", title="block type")


def fallback_share_setting() -> Any:
    """Of a variant whose denominators can be bad: how many may be."""
    return setting(
        0.0,
        Group.STABILITY,
        "Share of bad denominators that is still tolerated before a call falls back.",
        unit="share",
        ge=0.0,
        le=1.0,
        step=0.001,
    )


def reserve_setting() -> Any:
    """Of a variant that asks for room: whether to ask."""
    return setting(
        True,
        Group.MEMORY,
        "Before the first call of each shape ask ComfyUI to make room for what the call will "
        "need, which unloads models that this sampling doesn't use.",
    )


def reserve_factor_setting() -> Any:
    """Of a variant that asks for room: how much more than the estimate."""
    return setting(
        1.1,
        Group.MEMORY,
        "Room asked for, as a multiple of the estimate.",
        ge=1.0,
        le=4.0,
        step=0.05,
        advanced=True,
    )
