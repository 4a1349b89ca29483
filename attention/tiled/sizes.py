"""How much is computed at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .tiles import SLOTS


@dataclass(frozen=True, slots=True)
class Sizes:
    """Working memory that may be used, in bytes: a trade of speed.

    Attributes:
        heads: copies and pooled tiles of the heads that are computed at a time.
        logits: of one run of query tiles.
        terms: first-order terms of query tiles.
        cross: H of tiles, on the way to them.
    """

    heads: int
    logits: int
    terms: int
    cross: int


CPU_SIZES = Sizes(heads=0, logits=3 * 2**20, terms=32 * 2**20, cross=8 * 2**20)
"""One head at a time, and what stays in the cache: a fresh page costs as much as filling it."""

DEVICE_SIZES = Sizes(heads=1024 * 2**20, logits=512 * 2**20, terms=512 * 2**20, cross=512 * 2**20)


def sizes(device: torch.device) -> Sizes:
    """The bounds for a device."""
    return CPU_SIZES if device.type == "cpu" else DEVICE_SIZES


def heads_at_a_time(
    heads: int, width: int, value_width: int, size: int, tiles: int, device: torch.device
) -> int:
    """How many of ``heads`` heads the bounds of a device allow, at least one.

    Args:
        heads: of a picture.
        width: D.
        value_width: Dv.
        size: bytes of a number.
        tiles: T.
        device: where.
    """
    per_head = size * tiles * (SLOTS * 3 * (width + value_width) + 2 * width * value_width)
    most = max(1, sizes(device).heads // max(1, per_head))
    return math.ceil(heads / math.ceil(heads / most))
