"""Pictures of captions: flat coloured shapes over a soft, nearly grey gradient.

Lengths are fractions of the picture's shorter side, positions fractions of its width and height;
y grows downwards. A thing's ``radius`` is that of the circle with the same area, whatever its
shape, so that sizes compare across shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .captions import Caption, Thing

PALETTE = {
    "red": (0.86, 0.13, 0.13),
    "yellow": (0.95, 0.83, 0.10),
    "green": (0.12, 0.66, 0.20),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.13, 0.25, 0.88),
    "purple": (0.68, 0.15, 0.82),
}
RADIUS_RANGE: dict[str | None, tuple[float, float]] = {
    "small": (0.108, 0.112),
    None: (0.138, 0.142),
    "large": (0.168, 0.172),
}
RADIUS_LIMIT = 0.14
"""A thing below this radius is small, one above it large; one without a size is in between."""

SQUARE_HALF_SIDE = math.sqrt(math.pi) / 2
TRIANGLE_CIRCUMRADIUS = math.sqrt(4 * math.pi / (3 * math.sqrt(3)))
"""Half a side and a circumradius of the square and the triangle whose area is a unit circle's."""

_MARGIN = 0.012
_JITTER = 0.015
_PLACE_X = {"left": 0.25, "right": 0.75}
_PLACE_Y = {"top": 0.25, "bottom": 0.75}


@dataclass(frozen=True)
class Item:
    """A thing put somewhere: colour (RGB 0..1), shape, centroid and radius."""

    colour: tuple[float, float, float]
    shape: str
    x: float
    y: float
    radius: float


def extents(shape: str) -> tuple[float, float, float, float]:
    """How far a shape of radius 1 reaches left, right, up and down from its centroid."""
    if shape == "circle":
        return 1.0, 1.0, 1.0, 1.0
    if shape == "square":
        return (SQUARE_HALF_SIDE,) * 4
    half_width = TRIANGLE_CIRCUMRADIUS * math.sqrt(3) / 2
    return half_width, half_width, TRIANGLE_CIRCUMRADIUS, TRIANGLE_CIRCUMRADIUS / 2


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Distance to a shape's outline, negative inside; dx, dy and radius in the same unit."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - SQUARE_HALF_SIDE * radius
    inradius = TRIANGLE_CIRCUMRADIUS * radius / 2
    slanted = np.abs(dx) * (math.sqrt(3) / 2) - dy * 0.5
    return np.maximum(slanted, dy) - inradius


def layout(caption: Caption) -> list[tuple[float, float]]:
    """Where a caption's things belong: centres x, y in 0..1."""
    if caption.second is None:
        words = (caption.place or "center").split()
        return [
            (
                next((_PLACE_X[w] for w in words if w in _PLACE_X), 0.5),
                next((_PLACE_Y[w] for w in words if w in _PLACE_Y), 0.5),
            )
        ]
    low, high = 0.27, 0.73
    first, second = (low, high) if caption.relation in ("left of", "above") else (high, low)
    if caption.relation in ("left of", "right of"):
        return [(first, 0.5), (second, 0.5)]
    return [(0.5, first), (0.5, second)]


def arrange(caption: Caption, rng: np.random.Generator) -> list[Item]:
    """Put a caption's things where it says, give or take a little."""
    items = []
    for thing, (x, y) in zip(caption.things, layout(caption), strict=True):
        radius = _draw_radius(thing, rng)
        left, right, up, down = (reach * radius for reach in extents(thing.shape))
        x = _clamp(x + rng.uniform(-_JITTER, _JITTER), left, 1 - right)
        y = _clamp(y + rng.uniform(-_JITTER, _JITTER), up, 1 - down)
        items.append(_item(thing, x, y, radius, rng))
    return items


def _draw_radius(thing: Thing, rng: np.random.Generator) -> float:
    return float(rng.uniform(*RADIUS_RANGE[thing.size]))


def _item(thing: Thing, x: float, y: float, radius: float, rng: np.random.Generator) -> Item:
    colour = np.clip(np.array(PALETTE[thing.colour]) + rng.uniform(-0.02, 0.02, 3), 0, 1)
    red, green, blue = colour.tolist()
    return Item((red, green, blue), thing.shape, float(x), float(y), radius)


def _clamp(value: float, low: float, high: float) -> float:
    return float(min(max(value, low + _MARGIN), high - _MARGIN))


def gradient(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A soft nearly grey background, float32 [height, width, 3] in 0..1."""
    grey = rng.uniform(0.6, 0.85) + rng.uniform(-0.1, 0.1, (2, 2, 1))
    tint = rng.uniform(-0.04, 0.04, (1, 1, 3))
    corners = np.clip(grey + tint, 0.3, 0.97).astype(np.float32)
    v = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None, None]
    u = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None, :, None]
    top = corners[0, 0] * (1 - u) + corners[0, 1] * u
    bottom = corners[1, 0] * (1 - u) + corners[1, 1] * u
    return top * (1 - v) + bottom * v


def draw(items: list[Item], background: np.ndarray) -> np.ndarray:
    """Paint items over a background [H, W, 3] in place, with anti-aliased edges; returns it."""
    height, width = background.shape[:2]
    side = min(width, height)
    for item in items:
        radius = item.radius * side
        cx, cy = item.x * width, item.y * height
        left, right, up, down = (reach * radius for reach in extents(item.shape))
        x0, x1 = max(int(cx - left) - 1, 0), min(int(cx + right) + 3, width)
        y0, y1 = max(int(cy - up) - 1, 0), min(int(cy + down) + 3, height)
        dx = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - cx)
        dy = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - cy)
        distance = signed_distance(item.shape, dx, dy, radius)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None].astype(np.float32)
        patch = background[y0:y1, x0:x1]
        patch += cover * (np.asarray(item.colour, dtype=np.float32) - patch)
    return background


def render(caption: Caption, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A random picture that a caption is true of: float32 [height, width, 3] in 0..1."""
    return draw(arrange(caption, rng), gradient(width, height, rng))
