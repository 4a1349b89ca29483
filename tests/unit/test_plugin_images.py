"""Finished pictures on their way to the server: as they are, unless that is too much."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnscope.comfy_plugin import images

RUN = "0" * 32


def noise(height: int, width: int, channels: int = 3) -> Any:
    return np.random.default_rng(1).integers(0, 256, (height, width, channels), np.uint8)


def sent(folder: Path, pixels: Any) -> tuple[Any, Any]:
    path = folder / "picture.png"
    Image.fromarray(pixels).save(path)
    event = images.FinalDraft(RUN, str(path)).build(3)
    assert event is not None
    data = base64.b64decode(base64.b64encode(event.data))
    return event, np.asarray(Image.open(io.BytesIO(data)))


def test_a_finished_picture_keeps_every_pixel(tmp_path: Path) -> None:
    pixels = noise(48, 1344)
    event, arrived = sent(tmp_path, pixels)
    assert (event.media_type, event.width, event.height) == ("image/png", 1344, 48)
    assert np.array_equal(arrived, pixels)


def test_transparency_is_left_out(tmp_path: Path) -> None:
    pixels = noise(16, 16, 4)
    _, arrived = sent(tmp_path, pixels)
    assert np.array_equal(arrived, pixels[:, :, :3])


@pytest.mark.parametrize(("bound", "value"), [("FINAL_PIXELS", 1000), ("FINAL_BYTES", 1000)])
def test_one_that_is_too_large_comes_smaller_and_as_jpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(images, bound, value)
    monkeypatch.setattr(images, "FINAL_SIDE", 32)
    event, arrived = sent(tmp_path, noise(64, 48))
    assert (event.media_type, event.width, event.height) == ("image/jpeg", 24, 32)
    assert arrived.shape == (32, 24, 3)


def test_a_missing_or_broken_file_is_left_out(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    for path in (broken, tmp_path / "missing.png"):
        assert images.FinalDraft(RUN, str(path)).build(0) is None
