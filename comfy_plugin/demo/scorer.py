"""Whether a picture shows what its caption says.

Pixels are grouped by colour, then into connected parts. Every part of any size counts: a caption
holds only if the picture shows exactly its things, each of the right colour and shape, of the
right size where the caption says one, and standing as the caption says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .captions import COLOURS, SHAPES, Caption
from .pictures import PALETTE, RADIUS_LIMIT, TRIANGLE_CIRCUMRADIUS, signed_distance

MIN_CHROMA = 0.30
"""Pixels greyer than this (max − min of RGB) are background; backgrounds stay below 0.1."""
MIN_AREA = 0.0025
"""Parts smaller than this share of the picture are specks (a small thing covers 0.028)."""
MIN_OVERLAP = 0.86
"""Intersection over union that a part must reach with the ideal shape of its own area. A circle
and a square of the same area reach 0.83, a triangle 0.72 and less."""
MAX_COLOUR_DISTANCE = 0.30
"""How far a part's mean colour may lie from its palette entry (a picture's own: below 0.07)."""


@dataclass(frozen=True)
class Found:
    """A coloured part of a picture; x, y in 0..1, radius as in ``pictures``.

    shape is None where no shape fits.
    """

    colour: str
    shape: str | None
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """ok, and if not, why: a short machine-readable reason."""

    ok: bool
    reason: str


def find_things(image: np.ndarray) -> list[Found]:
    """The coloured parts of an image [H, W, 3] in 0..1, the largest first."""
    height, width = image.shape[:2]
    image = np.asarray(image, dtype=np.float32)
    chroma = image.max(2) - image.min(2)
    palette = np.array([PALETTE[colour] for colour in COLOURS], dtype=np.float32)
    # Hue only: a pixel on an anti-aliased edge has its thing's hue, but a duller colour.
    nearest = np.argmax(_direction(image) @ _direction(palette).T, axis=2)
    found = []
    for index, colour in enumerate(COLOURS):
        coloured = (nearest == index) & (chroma > MIN_CHROMA)
        if np.count_nonzero(coloured) < MIN_AREA * height * width:
            continue
        labels, count = ndimage.label(coloured)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        for label in range(1, count + 1):
            if areas[label] < MIN_AREA * height * width:
                continue
            mask = labels == label
            mean = image[mask].mean(0)
            if np.linalg.norm(mean - palette[index]) > MAX_COLOUR_DISTANCE:
                name = "off-colour"
            else:
                name = colour
            found.append(_describe(mask, name))
    return sorted(found, key=lambda thing: -thing.radius)


def _direction(colours: np.ndarray) -> np.ndarray:
    """Unit vectors of colours without their grey part: hue as a direction."""
    tint = colours - colours.mean(-1, keepdims=True)
    return tint / np.maximum(np.linalg.norm(tint, axis=-1, keepdims=True), 1e-6)


def _describe(mask: np.ndarray, colour: str) -> Found:
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    cy, cx = rows.mean() + 0.5, columns.mean() + 0.5
    radius = float(np.sqrt(len(rows) / np.pi))
    # Only the part of the picture that the mask or an ideal shape of its area can reach.
    reach = TRIANGLE_CIRCUMRADIUS * radius + 1
    top, bottom = min(rows.min(), int(cy - reach)), max(rows.max(), int(cy + reach)) + 1
    left, right = min(columns.min(), int(cx - reach)), max(columns.max(), int(cx + reach)) + 1
    top, left, bottom, right = max(top, 0), max(left, 0), min(bottom, height), min(right, width)
    part = mask[top:bottom, left:right]
    dx = np.arange(left, right)[None, :] + 0.5 - cx
    dy = np.arange(top, bottom)[:, None] + 0.5 - cy
    overlaps = {}
    for shape in SHAPES:
        ideal = signed_distance(shape, dx, dy, radius) <= 0
        overlaps[shape] = float((ideal & part).sum() / (ideal | part).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return Found(
        colour=colour,
        shape=best if overlaps[best] >= MIN_OVERLAP else None,
        x=float(cx / width),
        y=float(cy / height),
        radius=radius / min(width, height),
        overlap=overlaps[best],
    )


def judge(image: np.ndarray, caption: Caption) -> Verdict:
    """Whether an image [H, W, 3] in 0..1 shows exactly what a caption says."""
    found = find_things(image)
    if len(found) != len(caption.things):
        return Verdict(False, f"things:{len(found)}")
    placed = []
    for thing in caption.things:
        match = [part for part in found if part.colour == thing.colour]
        if len(match) != 1:
            return Verdict(False, "colour")
        part = match[0]
        if part.shape != thing.shape:
            return Verdict(False, f"shape:{part.shape}:{part.overlap:.2f}")
        if thing.size is not None and (part.radius > RADIUS_LIMIT) != (thing.size == "large"):
            return Verdict(False, "size")
        placed.append(part)
    if caption.place is not None and caption.place != place_of(placed[0].x, placed[0].y):
        return Verdict(False, "place")
    if caption.second is not None and caption.relation != relation_of(*placed):
        return Verdict(False, "relation")
    return Verdict(True, "ok")


def place_of(x: float, y: float) -> str:
    """The place word of a position: a third of the picture, a little wider in the middle."""
    column = "left" if x < 0.39 else "right" if x > 0.61 else ""
    row = "top" if y < 0.39 else "bottom" if y > 0.61 else ""
    return " ".join(word for word in (row, column) if word) or "center"


def relation_of(first: Found, second: Found) -> str | None:
    """The relation along the longer of the two distances; None where neither is clear."""
    dx, dy = second.x - first.x, second.y - first.y
    if max(abs(dx), abs(dy)) < 0.15:
        return None
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"
