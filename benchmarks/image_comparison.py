"""What lossless pictures cost, and what it takes to compare two of them.

A picture of 1024 × 1024 pixels with the spectrum of photographs (amplitude over frequency), and a
little noise as cameras and decoders leave it. Sizes and times of ComfyUI's PNG against the JPEG
that a finished picture would otherwise be; the figures that such a JPEG alone leaves; and the time
of one comparison.
"""

from __future__ import annotations

import io
import statistics
import time

import numpy as np
import numpy.typing as npt
from PIL import Image

from attnscope.backend import image_quality
from attnscope.comfy_plugin import images

RESULTS = ("image_comparison_1mp_ms", "final_png_over_jpeg_bytes")

SIDE = 1024
PAIRS = 7


def photograph() -> npt.NDArray[np.uint8]:
    """[SIDE, SIDE, 3] of uint8: mostly grey 1/f noise, some colour, a standard deviation of 55."""
    rng = np.random.default_rng(7)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :])
    frequency[0, 0] = np.inf

    def noise() -> npt.NDArray[np.float64]:
        spectrum = np.fft.rfft2(rng.normal(size=(SIDE, SIDE))) / frequency**1.2
        field = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
        return field / field.std()

    grey = noise()
    channels = [grey + 0.25 * noise() for _ in range(3)]
    grain = rng.normal(scale=1.0, size=(SIDE, SIDE, 3))
    return np.clip(np.rint(120 + 55 * np.stack(channels, axis=2) + grain), 0, 255).astype(np.uint8)


def main() -> None:
    pixels = photograph()
    picture = Image.fromarray(pixels)
    times: dict[str, list[float]] = {"png": [], "jpeg": [], "compare": []}
    for _ in range(PAIRS):
        began = time.perf_counter()
        lossless = images.encode_losslessly(picture)
        encoded = time.perf_counter()
        lossy = images.encode(picture, SIDE, quality=92)
        both = time.perf_counter()
        other = np.asarray(Image.open(io.BytesIO(lossy[0])).convert("RGB"))
        decoded = time.perf_counter()
        found = image_quality.difference(pixels, other)
        times["compare"].append(time.perf_counter() - decoded)
        times["png"].append(encoded - began)
        times["jpeg"].append(both - encoded)
    assert lossless is not None
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    print(f"PNG  {len(lossless[0]) / SIDE**2:.2f} bytes a pixel, {ms['png']:.0f} ms")
    print(f"JPEG {len(lossy[0]) / SIDE**2:.2f} bytes a pixel, {ms['jpeg']:.0f} ms, ", end="")
    print(f"PSNR {found.psnr:.1f} dB, SSIM {found.ssim:.4f}")
    print(f"RESULT image_comparison_1mp_ms {ms['compare']:.0f}")
    print(f"RESULT final_png_over_jpeg_bytes {len(lossless[0]) / len(lossy[0]):.2f}")


if __name__ == "__main__":
    main()
