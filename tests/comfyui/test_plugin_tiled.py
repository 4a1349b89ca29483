"""Tiled attention in the real ComfyUI: it samples, it differs from exact, it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import state
import torch
from flux import LAYERS, conditioning, sample

pytestmark = pytest.mark.comfyui

SIDE = 64
"""Latent pixels, 32×32 tokens: 4×4 tiles, of which a window of radius 1 has nine."""

OPEN = {"min_tokens": 0, "dense_first_steps": 0}


def test_it_samples_near_to_exact_and_reports_what_it_left_out(
    flux: Any, prepared: Any, receiver: Any
) -> None:
    exact = sample(flux, side=SIDE)
    model = prepared("tiled", min_tokens=0, dense_first_steps=1, quality_every=1)
    before = (state.of_model(flux), state.of_model(model))
    tiled = sample(model, side=SIDE)
    assert (state.of_model(flux), state.of_model(model)) == before
    assert not torch.equal(exact, tiled)
    assert (tiled - exact).norm() < 0.05 * exact.norm()
    assert torch.equal(exact, sample(flux, side=SIDE))
    assert receiver.finished()[0].variant == "tiled"
    paths = {step.step: step.layers.path for step in receiver.steps()}
    assert paths[0] == ["exact"] * len(LAYERS)
    assert paths[1] == paths[2] == paths[3] == ["tiled"] * len(LAYERS)
    assert {reason.reason for reason in receiver.steps()[0].reasons} == {"dense_step"}
    metrics = receiver.steps()[3].layers.metrics
    assert all(0 < value < 0.02 for value in metrics["nmse"])
    assert all(abs(value) < 0.1 for value in metrics["log_mass_bias"])


def test_a_window_over_the_whole_picture_is_exact_but_for_rounding(
    flux: Any, prepared: Any
) -> None:
    exact = sample(flux, side=SIDE)
    tiled = sample(prepared("tiled", window_radius=4, **OPEN), side=SIDE)
    torch.testing.assert_close(tiled, exact, rtol=1e-3, atol=1e-3)


def test_batches_with_guidance_and_ragged_pictures(
    flux: Any, prepared: Any, receiver: Any
) -> None:
    how = {
        "batch": 2, "cfg": 3.0, "steps": 2,
        "start_latent": {"samples": torch.zeros(2, 16, 50, 70)},
    }  # fmt: skip
    exact = sample(flux, **how)
    tiled = sample(prepared("tiled", **OPEN), **how)
    assert not torch.equal(exact, tiled)
    assert (tiled - exact).norm() < 0.1 * exact.norm()
    receiver.finished()
    for step in receiver.steps():
        assert step.layers.path == ["tiled"] * len(LAYERS)


def test_reference_latents_have_tiles_of_their_own(
    flux: Any, prepared: Any, receiver: Any
) -> None:
    import nodes

    reference = torch.randn(1, 16, 24, 40, generator=torch.Generator().manual_seed(3))

    def run(model: Any) -> torch.Tensor:
        positive, negative = conditioning(1, 16), conditioning(2, 16)
        positive[0][1]["reference_latents"] = [reference]
        begin = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
        with torch.inference_mode():
            (result,) = nodes.common_ksampler(
                model, 7, 2, 1.0, "euler", "simple", positive, negative, begin, denoise=1.0
            )
        return result["samples"].clone()

    exact, tiled = run(flux), run(prepared("tiled", **OPEN))
    assert not torch.equal(exact, tiled)
    assert (tiled - exact).norm() < 0.05 * exact.norm()
    receiver.finished()
    for step in receiver.steps():
        assert step.layers.path == ["tiled"] * len(LAYERS)


def test_a_model_that_does_not_say_its_layout_runs_exact_with_the_reason(
    flux: Any, prepared: Any, receiver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope.comfy_plugin import hooks

    monkeypatch.setattr(hooks, "_patch_size", lambda patcher: None)
    assert torch.equal(sample(flux), sample(prepared("tiled", **OPEN)))
    receiver.finished()
    for step in receiver.steps():
        assert step.layers.path == ["exact"] * len(LAYERS)
        assert {reason.reason for reason in step.reasons} == {"layout"}
