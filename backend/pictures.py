"""Image files as arrays, and error maps as image files."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from .image_quality import Picture, absolute_error

MOST_PIXELS = 4096 * 4096
"""Larger pictures are not compared: it would take the machine's time for many seconds."""

MAP_SIDE = 1024
SCALES = (8, 16, 32, 64, 128, 255)
"""Errors, of 255, that an error map's brightest colour can stand for."""

COLORS = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e",
    "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip
"""Colours of an error map, from no error to the scale's end; brighter is worse."""


class UnreadablePicture(ValueError):
    """A file can't be compared; the message says why."""


def read(path: Path) -> Picture:
    """A file's picture, [height, width, 3] of uint8 (RGB).

    Raises:
        UnreadablePicture: the file is missing, is no picture, or is too large.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own limit lies elsewhere; ours is asked first, before any pixel is read.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise UnreadablePicture(
                        f"{image.width}×{image.height} pixels; allowed: {MOST_PIXELS} in all"
                    )
                return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise UnreadablePicture("the image's file is missing") from None
    except UnreadablePicture:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadablePicture(f"the image can't be decoded ({error})") from None


def fitting_scale(error: int) -> int:
    """The smallest scale of an error map that an error, of 255, lies within."""
    return next(scale for scale in SCALES if error <= scale)


def error_map(one: Picture, other: Picture, scale: int) -> bytes:
    """Where two pictures differ, as PNG.

    A pixel's value is the largest absolute error of its channels. Of a picture with a side above
    `MAP_SIDE` the largest value of each square block is kept, so that nothing small gets lost.

    Args:
        one: [height, width, 3].
        other: [height, width, 3].
        scale: error, of 255, from which on the brightest colour is shown.
    """
    errors = absolute_error(one, other).max(axis=2)
    block = -(-max(errors.shape) // MAP_SIDE)
    if block > 1:
        high, wide = (-(-side // block) for side in errors.shape)
        padded = np.zeros((high * block, wide * block), np.uint8)
        padded[: errors.shape[0], : errors.shape[1]] = errors
        errors = padded.reshape(high, block, wide, block).max(axis=(1, 3))
    levels = np.minimum(255, np.rint(np.arange(256) * (255.0 / scale))).astype(np.uint8)
    image = Image.fromarray(levels[errors])
    image.putpalette(_palette())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _palette() -> list[int]:
    anchors = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS])
    places = np.linspace(0, len(COLORS) - 1, 256)
    channels = [np.interp(places, range(len(COLORS)), anchors[:, i]) for i in range(3)]
    return [int(value) for value in np.rint(np.stack(channels, axis=1)).ravel()]
