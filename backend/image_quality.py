"""How far a picture lies from another one: numbers over arrays, no files, no cache.

A picture is an array [height, width, 3] of uint8 (RGB). The numbers are computed in float64, in
bands of rows, so that the memory beside the pictures stays at a few megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

DATA_RANGE = 255.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03

_CHANNELS = 3
_BAND_ROWS = 64


@dataclass(frozen=True)
class Difference:
    """What two pictures of one size differ by.

    Attributes:
        psnr: dB, infinite for identical pictures.
        ssim: mean over pixels and channels; None where a side is shorter than the window.
        mae: mean absolute error over pixels and channels, of 255.
        max_error: largest absolute error, of 255.
        error_p999: 99.9th percentile over pixels of the largest error of a pixel's channels.
    """

    psnr: float
    ssim: float | None
    mae: float
    max_error: int
    error_p999: int


IDENTICAL = Difference(psnr=math.inf, ssim=1.0, mae=0.0, max_error=0, error_p999=0)


def difference(one: Picture, other: Picture) -> Difference:
    """Compare two pictures.

    Args:
        one: [height, width, 3].
        other: [height, width, 3].

    Raises:
        ValueError: their shapes differ.
    """
    if one.shape != other.shape:
        raise ValueError(f"shape: {other.shape}; allowed: {one.shape}, as the other picture has")
    squares = total = 0
    histogram = np.zeros(256, np.int64)
    for rows in _bands(one.shape[0]):
        errors = absolute_error(one[rows], other[rows])
        total += int(errors.sum(dtype=np.int64))
        squares += int(np.square(errors, dtype=np.int64).sum())
        histogram += np.bincount(errors.max(axis=2).ravel(), minlength=256)
    mse = squares / one.size
    reached = np.cumsum(histogram)
    return Difference(
        psnr=10.0 * math.log10(DATA_RANGE**2 / mse) if squares else math.inf,
        ssim=ssim(one, other),
        mae=total / one.size,
        max_error=int(np.flatnonzero(histogram)[-1]),
        error_p999=int(np.searchsorted(reached, 0.999 * reached[-1])),
    )


def absolute_error(one: Picture, other: Picture) -> Picture:
    """|one − other| for each pixel and channel, uint8 like both of them."""
    return np.maximum(one, other) - np.minimum(one, other)


def ssim(one: Picture, other: Picture) -> float | None:
    """Mean structural similarity.

    Z. Wang, A. C. Bovik, H. R. Sheikh and E. P. Simoncelli, "Image quality assessment: from error
    visibility to structural similarity", IEEE Transactions on Image Processing 13 (2004), eq. 13:
    an 11×11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03, L = 255; for each
    channel of RGB, and only where the whole window lies within the picture.

    Args:
        one: [height, width, 3].
        other: [height, width, 3].

    Returns:
        At most 1, which identical pictures have; None where a side is shorter than the window.
    """
    height, width = one.shape[:2]
    if min(height, width) < SSIM_WINDOW:
        return None
    inner = height - SSIM_WINDOW + 1
    total = 0.0
    for rows in _bands(inner):
        whole = slice(rows.start, rows.stop + SSIM_WINDOW - 1)
        total += float(_ssim_map(one[whole], other[whole]).sum())
    mean: float = total / (inner * (width - SSIM_WINDOW + 1) * _CHANNELS)
    return mean


def _ssim_map(one: Picture, other: Picture) -> Floats:
    x = one.reshape(one.shape[0], -1).astype(np.float64)
    y = other.reshape(other.shape[0], -1).astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x * mean_x
    var_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * DATA_RANGE) ** 2, (SSIM_K2 * DATA_RANGE) ** 2
    above = (2.0 * mean_x * mean_y + c1) * (2.0 * covariance + c2)
    below = (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2)
    return above / below


def _window() -> list[float]:
    half = SSIM_WINDOW // 2
    raw = [math.exp(-0.5 * (i / SSIM_SIGMA) ** 2) for i in range(-half, half + 1)]
    return [value / sum(raw) for value in raw]


_WEIGHTS = _window()


def _blur(rows: Floats) -> Floats:
    """The Gaussian window over [height, width · 3], where it lies within."""
    down = _fold(rows, 1)
    return _fold(down.T, _CHANNELS).T


def _fold(values: Floats, stride: int) -> Floats:
    """Weighted sums along the first axis, whose neighbours are ``stride`` items apart."""
    half = SSIM_WINDOW // 2
    length = values.shape[0] - (SSIM_WINDOW - 1) * stride
    centre = half * stride
    result: Floats = values[centre : centre + length] * _WEIGHTS[half]
    for offset in range(1, half + 1):
        step = offset * stride
        before = values[centre - step : centre - step + length]
        after = values[centre + step : centre + step + length]
        result += (before + after) * _WEIGHTS[half + offset]
    return result


def _bands(height: int) -> Iterator[slice]:
    for start in range(0, height, _BAND_ROWS):
        yield slice(start, min(start + _BAND_ROWS, height))
