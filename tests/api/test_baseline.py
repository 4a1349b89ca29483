"""Baselines: which exact run belongs to a run, and what their pictures differ by."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text
from support.events import RunScript, instance

from attnscope.backend import image_quality, pictures
from attnscope.db import migrate
from attnscope.db.session import Store

RECIPE = "a" * 64


def picture(height: int = 40, width: int = 50, shift: int = 0) -> np.ndarray:
    """Smooth waves with some edges, in three different channels."""
    y, x = np.mgrid[0:height, 0:width]
    waves = 60 * np.sin(x / 9.0) * np.cos(y / 13.0)
    edges = 40 * ((x // 16 + y // 16) % 2)
    channels = [127 + factor * waves + edges for factor in (1.0, 0.7, -0.9)]
    made = np.clip(np.rint(np.stack(channels, axis=2)), 0, 250 - abs(shift))
    return (made + shift).astype(np.uint8)


def noisy(original: np.ndarray, amplitude: int) -> np.ndarray:
    """With noise that is the same on every machine."""
    seed, count = original.shape[0], original.size
    counter = np.arange(count, dtype=np.uint64)
    mixed = (counter * np.uint64(2654435761) + np.uint64(seed * 40503)) % np.uint64(2**32)
    noise = ((mixed >> np.uint64(8)) % np.uint64(2 * amplitude + 1)).astype(int) - amplitude
    added = original.astype(int) + noise.reshape(original.shape)
    return np.clip(added, 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


def sample(
    api: Any,
    variant: str = "exact",
    *finals: np.ndarray,
    at: float = 1000.0,
    media: str = "png",
    ends: str | None = "completed",
    device: Any = None,
    attn_ms: float = 1.0,
    **sampling: Any,
) -> str:
    """Hand in a run with its finished pictures; its id."""
    script = RunScript(layers=1, steps=2, variant=variant, at=at)
    started = script.started()
    fields = {"recipe": RECIPE, **sampling}
    started = started.model_copy(update={"sampling": started.sampling.model_copy(update=fields)})
    events = [started, script.step(0, attn_ms=[attn_ms])]
    events += [script.ended(ends)] if ends else []
    for pixels in finals:
        data = base64.b64encode(encoded(pixels, media.upper()))
        size = {"width": pixels.shape[1], "height": pixels.shape[0]}
        events.append(script.image("final", None, media_type=f"image/{media}", data=data, **size))
    api.send(*events, instance=device)
    return script.run_id


def candidates(api: Any, run_id: str) -> list[str]:
    answer = api.get(f"/runs/{run_id}/baseline")
    return [item["run"]["run_id"] for item in answer["candidates"]]


# Which run


def test_the_baseline_is_the_newest_completed_exact_run_of_the_same_conditions(api: Any) -> None:
    old = sample(api, "exact", picture(), at=1000.0)
    new = sample(api, "exact", picture(), at=2000.0)
    bare = sample(api, "exact", at=2500.0)
    sample(api, "exact", picture(), at=3000.0, seed=8)
    sample(api, "exact", picture(), at=3000.0, ends="interrupted")
    sample(api, "exact", picture(), at=3000.0, ends=None)
    sample(api, "exact", picture(), at=3000.0, recipe="b" * 64)
    sample(api, "taylor", picture(), at=3000.0)
    run = sample(api, "taylor", picture(), at=1500.0)

    assert candidates(api, run) == [bare, new, old]
    answer = api.get(f"/runs/{run}/baseline")
    assert answer["recommended"] == new, "the newest that has a picture"
    assert answer["reason"] is None and answer["nearest"] is None
    first = answer["candidates"][1]
    assert first["match"] == {"comparable": True, "differs": [], "unknown": []}
    assert first["run"]["attn_ms"] == 1.0 and first["run"]["duration_ms"] == 4321.0
    assert [image["width"] for image in first["run"]["finals"]] == [50]
    assert candidates(api, new) == [bare, old], "an exact run is no baseline of its own"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 8),
        ("sigmas", [1.0, 0.6, 0.0]),
        ("sampler", "heun"),
        ("cfg", 2.0),
        ("denoise", 0.5),
        ("latent_shape", [1, 16, 32, 32]),
    ],
)
def test_a_run_without_a_baseline_is_told_what_the_nearest_differs_in(
    api: Any, field: str, value: Any
) -> None:
    sample(api, "exact", picture(), at=900.0, **{field: value, "seed": 77, "cfg": 9.0})
    near = sample(api, "exact", picture(), recipe="c" * 64, **{field: value})
    run = sample(api, "taylor", picture())
    answer = api.get(f"/runs/{run}/baseline")
    assert answer["candidates"] == [] and answer["recommended"] is None
    assert answer["reason"] == "none_comparable"
    assert answer["nearest"]["run"]["run_id"] == near
    [difference] = answer["nearest"]["match"]["differs"]
    assert difference["name"] == field
    assert difference["run"] != difference["baseline"]
    assert difference["title"] in answer["detail"]
    assert "AttnScope Monitor" in answer["detail"]


def test_the_same_numbers_of_another_prompt_are_no_baseline(api: Any) -> None:
    sample(api, "exact", picture(), recipe="c" * 64)
    answer = api.get(f"/runs/{sample(api, 'taylor', picture())}/baseline")
    assert answer["reason"] == "none_comparable"
    assert [item["name"] for item in answer["nearest"]["match"]["differs"]] == ["recipe"]
    assert "prompt" in answer["detail"]


def test_a_run_of_an_older_plugin_matches_on_the_rest_and_says_so(api: Any) -> None:
    known = sample(api, "exact", picture(), at=1000.0)
    silent = sample(api, "exact", picture(), at=2000.0, recipe=None)
    run = sample(api, "taylor", picture())
    answer = api.get(f"/runs/{run}/baseline")
    assert [item["run"]["run_id"] for item in answer["candidates"]] == [known, silent]
    assert [item["match"]["unknown"] for item in answer["candidates"]] == [[], ["recipe"]]
    assert candidates(api, sample(api, "taylor", picture(), recipe=None)) == [silent, known]


def test_without_seed_and_prompt_nothing_is_the_same(api: Any) -> None:
    sample(api, "exact", picture(), seed=None, recipe=None)
    run = sample(api, "taylor", picture(), seed=None, recipe=None)
    answer = api.get(f"/runs/{run}/baseline")
    assert (answer["reason"], answer["candidates"]) == ("conditions_unknown", [])
    # The recipe of a workflow holds the seed.
    exact = sample(api, "exact", picture(), seed=None)
    assert candidates(api, sample(api, "taylor", picture(), seed=None)) == [exact]


def test_no_exact_run_at_all(api: Any) -> None:
    answer = api.get(f"/runs/{sample(api, 'taylor', picture())}/baseline")
    assert answer["reason"] == "none_exact"
    assert "AttnScope Monitor" in answer["detail"]
    api.problem("GET", f"/runs/{'0' * 32}/baseline", 404)


def test_schedules_of_two_devices_are_the_same_but_for_the_last_bits(api: Any) -> None:
    exact = sample(api, "exact", picture(), sigmas=[1.0, 0.3333333333, 0.0], denoise=1)
    run = sample(api, "taylor", picture(), sigmas=[1.0, 0.3333333461, 0.0], denoise=1.0)
    assert candidates(api, run) == [exact]


def test_runs_of_an_older_database_find_their_baselines(tmp_path: Path, make_api: Any) -> None:
    api = make_api("old")
    exact, run = sample(api, "exact", picture()), sample(api, "taylor", picture())
    store = Store(f"sqlite:///{tmp_path / 'old' / 'attnscope.db'}")
    migrate.downgrade(store, "0002")
    with store.writer.begin() as connection:
        columns = connection.execute(text("SELECT * FROM runs")).keys()
    assert "conditions" not in columns
    assert migrate.upgrade(store) is True
    store.close()
    assert candidates(api, run) == [exact]


# What they differ by


def test_identical_pictures_compare_as_identical(api: Any) -> None:
    exact = sample(api, "exact", picture(), attn_ms=4.0)
    run = sample(api, "taylor", picture(), attn_ms=1.0)
    answer = api.get(f"/runs/{run}/comparison", **{"with": exact})
    assert answer["run"]["run_id"] == run and answer["baseline"]["run_id"] == exact
    assert answer["match"]["comparable"] is True
    [pair] = answer["images"]
    assert (pair["psnr"], pair["ssim"], pair["mae"]) == ("Infinity", 1.0, 0.0)
    assert pair["identical"] is True and pair["lossless"] is True
    assert (pair["width"], pair["height"]) == (50, 40)
    assert answer["attn_ms"] == {"run": 1.0, "baseline": 4.0, "ratio": 0.25}
    assert answer["duration_ms"]["ratio"] == 1.0
    assert answer["same_device"] is True


def test_the_answer_has_the_figures_of_the_stored_pictures(api: Any) -> None:
    one = picture()
    other = noisy(one, 12)
    exact, run = sample(api, "exact", one, one), sample(api, "taylor", other, one, other)
    answer = api.get(f"/runs/{run}/comparison", **{"with": exact})
    first, second = answer["images"]
    expected = image_quality.difference(other, one)
    assert first["psnr"] == pytest.approx(expected.psnr, rel=1e-12)
    assert first["ssim"] == pytest.approx(expected.ssim, rel=1e-12)
    assert first["mae"] == pytest.approx(expected.mae, rel=1e-12)
    assert first["max_error"] == 12 and first["identical"] is False
    assert second["identical"] is True
    assert [first["index"], second["index"], answer["unpaired"]] == [0, 1, 1]
    for url, pixels in ((first["run_url"], other), (first["baseline_url"], one)):
        stored = Image.open(io.BytesIO(api.client.get(url).content))
        assert np.array_equal(np.asarray(stored), pixels)


def test_jpegs_are_compared_but_marked(api: Any) -> None:
    exact, run = sample(api, "exact", picture()), sample(api, "taylor", picture(), media="jpeg")
    [pair] = api.get(f"/runs/{run}/comparison", **{"with": exact})["images"]
    assert pair["lossless"] is False and pair["identical"] is False
    assert 20 < pair["psnr"] < 60


def test_any_two_runs_can_be_compared_and_are_told_what_differs(api: Any) -> None:
    exact = sample(api, "exact", picture(), seed=8, device=instance(device="cuda:0"))
    run = sample(api, "taylor", picture())
    answer = api.get(f"/runs/{run}/comparison", **{"with": exact})
    assert answer["match"]["comparable"] is False
    [difference] = answer["match"]["differs"]
    assert (difference["name"], difference["run"], difference["baseline"]) == ("seed", "7", "8")
    assert answer["same_device"] is False


def test_the_error_map_shows_where_and_how_much(api: Any) -> None:
    one = picture()
    other = one.copy()
    other[30, 20, 1] -= 20
    exact, run = sample(api, "exact", one), sample(api, "taylor", other)
    [pair] = api.get(f"/runs/{run}/comparison", **{"with": exact})["images"]
    assert pair["max_error"] == 20
    for scale, level in ((64, 80), (8, 255)):
        url = pair["error_map"]["url"].replace(f"scale={pair['error_map']['scale']}", "scale=%d")
        response = api.client.get(url % scale)
        assert response.headers["content-type"] == "image/png"
        assert "immutable" in response.headers["cache-control"]
        image = Image.open(io.BytesIO(response.content))
        levels = np.asarray(image)
        assert levels.shape == (40, 50)
        assert levels[30, 20] == level and np.count_nonzero(levels) == 1
    brightest = np.asarray(image.convert("RGB"))[30, 20]
    assert "#{:02x}{:02x}{:02x}".format(*brightest) == pair["error_map"]["colors"][-1]


def test_what_cannot_be_compared_says_why(api: Any) -> None:
    exact, run = sample(api, "exact", picture()), sample(api, "taylor", picture(shift=3))
    bare = sample(api, "taylor")
    larger = sample(api, "exact", picture(64, 50))
    path = f"/runs/{run}/comparison"

    for one, other, field in ((run, bare, "with"), (bare, run, "run_id")):
        problem = api.problem("GET", f"/runs/{one}/comparison", 409, params={"with": other})
        assert problem["type"] == "no-final-image"
        assert [(e["field"], e["value"]) for e in problem["errors"]] == [(field, bare)]

    problem = api.problem("GET", path, 422, params={"with": larger})
    assert problem["type"] == "image-sizes-differ"
    assert "50×64" in problem["detail"] and "50×40" in problem["detail"]

    api.problem("GET", path, 404, params={"with": "0" * 32})
    assert api.problem("GET", path, 422, params={"with": "x"})["errors"][0]["field"] == "with"
    assert api.problem("GET", path, 422)["errors"][0]["field"] == "with"

    final = api.get(f"/runs/{exact}")["final"]
    other_final = api.get(f"/runs/{run}")["final"]
    file = api.services.images.path(final)
    whole = file.read_bytes()
    for content, word in ((b"no picture", "decoded"), (whole[:60], "decoded"), (None, "missing")):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        problem = api.problem("GET", path, 422, params={"with": exact})
        assert problem["type"] == "image-unreadable" and word in problem["detail"]
        assert problem["errors"][0]["value"] == final
        if content is None:
            file.write_bytes(whole)
    api.get(path, **{"with": exact})

    map_path = f"/images/{other_final}/error-map"
    problem = api.problem("GET", map_path, 422, params={"with": final, "scale": 7})
    assert problem["errors"][0]["field"] == "scale"
    api.problem("GET", map_path, 404, params={"with": "0" * 64})


def test_a_pair_is_computed_once(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, run = sample(api, "exact", picture()), sample(api, "taylor", picture(shift=3))
    asked: list[str] = []
    read = pictures.read

    def counted(path: Path) -> Any:
        asked.append(path.name)
        return read(path)

    monkeypatch.setattr(pictures, "read", counted)
    first = api.get(f"/runs/{run}/comparison", **{"with": exact})
    again = api.get(f"/runs/{exact}/comparison", **{"with": run})
    assert first["images"][0]["psnr"] == again["images"][0]["psnr"]
    assert len(asked) == 2


def test_a_picture_too_large_is_refused_before_it_is_read(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1999)
    exact, run = sample(api, "exact", picture()), sample(api, "taylor", picture(shift=3))
    problem = api.problem("GET", f"/runs/{run}/comparison", 422, params={"with": exact})
    assert problem["type"] == "image-unreadable"
    assert "50×40 pixels; allowed: 1999" in problem["detail"]


# The figures themselves


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_psnr_of_a_constant_error_is_known(shift: int) -> None:
    one = picture(60, 70, 0)
    one = np.minimum(one, 250 - 5)
    found = image_quality.difference(one, one + np.uint8(shift))
    assert found.psnr == pytest.approx(20 * math.log10(255 / shift), rel=1e-12)
    assert (found.mae, found.max_error, found.error_p999) == (shift, shift, shift)


def test_psnr_of_noise_of_known_variance() -> None:
    rng = np.random.default_rng(3)
    one = np.full((256, 256, 3), 128, np.uint8)
    other = np.clip(np.rint(128 + rng.normal(0, 10, one.shape)), 0, 255).astype(np.uint8)
    # Rounding adds 1/12 to the noise's variance of 100.
    expected = 10 * math.log10(255**2 / (100 + 1 / 12))
    assert image_quality.difference(one, other).psnr == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("height", "width", "amplitude", "ssim", "psnr"),
    [
        (96, 130, 12, 0.8174483520039937, 30.97355946829202),
        (64, 64, 40, 0.35159710371300895, 20.75345419224626),
        (11, 11, 5, 0.9354468781532402, 38.11051222590241),
        (150, 37, 3, 0.9811207360574826, 42.10961685061526),
    ],
)
def test_ssim_is_that_of_the_reference(
    height: int, width: int, amplitude: int, ssim: float, psnr: float
) -> None:
    """Reference: scikit-image 0.26, gaussian_weights, sigma 1.5, population covariance."""
    one = picture(height, width)
    found = image_quality.difference(one, noisy(one, amplitude))
    assert found.ssim == pytest.approx(ssim, rel=1e-9)
    assert found.psnr == pytest.approx(psnr, rel=1e-9)


def test_ssim_does_not_depend_on_the_bands() -> None:
    one = picture(150, 37)
    other = noisy(one, 9)
    flipped = image_quality.ssim(one[::-1], other[::-1])
    assert image_quality.ssim(one, other) == pytest.approx(flipped, rel=1e-12)
    assert image_quality.ssim(other, one) == pytest.approx(flipped, rel=1e-12)


def test_small_pictures_have_no_ssim() -> None:
    found = image_quality.difference(picture(10, 50), picture(10, 50, 2))
    assert found.ssim is None and math.isfinite(found.psnr)
    with pytest.raises(ValueError, match="shape"):
        image_quality.difference(picture(10, 50), picture(50, 10))


def test_an_error_map_of_a_large_picture_keeps_its_peaks() -> None:
    one = np.zeros((20, 2500, 3), np.uint8)
    other = one.copy()
    other[7, 1701, 2] = 90
    levels = np.asarray(Image.open(io.BytesIO(pictures.error_map(one, other, 255))))
    assert levels.shape == (7, 834)
    assert np.argwhere(levels).tolist() == [[2, 567]] and levels[2, 567] == 90
