"""Gates: pure rules that decide whether a variant is due for a call."""

from __future__ import annotations

from .reasons import Gate
from .variant import LayerId


def tokens(queries: int, keys: int, min_tokens: int) -> Gate | None:
    """Too short a sequence gains nothing."""
    return Gate.BELOW_MIN_TOKENS if min(queries, keys) < min_tokens else None


def sigma(value: float | None, sigma_max: float) -> Gate | None:
    """Above ``sigma_max`` exact runs; 0 sets no limit.

    The comparison allows for float32: a step's own sigma, typed as the limit, is inside.
    """
    if sigma_max <= 0.0:
        return None
    if value is None:
        return Gate.SIGMA_UNKNOWN
    return Gate.SIGMA_ABOVE_MAX if value > sigma_max * (1.0 + 1e-6) else None


def layers(layer: LayerId | None, start: int, end: int) -> Gate | None:
    """Block indices from ``start`` to ``end``, both included; -1 sets no limit."""
    if start < 0 and end < 0:
        return None
    if layer is None:
        return Gate.LAYER_UNKNOWN
    inside = layer.block_index >= start and (end < 0 or layer.block_index <= end)
    return None if inside else Gate.LAYER_OUTSIDE_RANGE


def block_type(layer: LayerId | None, wanted: str) -> Gate | None:
    """Blocks of one kind; "all" sets no limit."""
    if wanted == "all":
        return None
    if layer is None:
        return Gate.LAYER_UNKNOWN
    return None if layer.block_type == wanted else Gate.BLOCK_TYPE


def cross_attention(queries: int, keys: int, allowed: bool) -> Gate | None:
    """Query and key lengths that differ."""
    return Gate.CROSS_ATTENTION if queries != keys and not allowed else None


def dense_steps(step: int, first_steps: int) -> Gate | None:
    """The first steps of a schedule, counted from 0, which lay out the picture."""
    return Gate.DENSE_STEP if step < first_steps else None
