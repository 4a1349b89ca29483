"""Capture: chosen calls of a real sampling in files, bounded, and never in the sampler's way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flux import LAYERS, sample

from attnscope.attention.captured import CapturedCall, read_call
from attnscope.attention.exact import reference_attention

pytestmark = pytest.mark.comfyui


@pytest.fixture
def captured(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[CapturedCall]]:
    """Samples with the monitor's settings and reads what was captured, in order of names."""
    import folder_paths

    from attnscope.comfy_plugin import hooks

    output = tmp_path / "output"
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    made: list[Any] = []
    real = hooks.capture_for

    def remembered(*args: Any, **kwargs: Any) -> Any:
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(hooks, "capture_for", remembered)

    def run(how: dict[str, Any] | None = None, **settings: Any) -> list[CapturedCall]:
        sample(prepared("exact", **settings), **(how or {}))
        for capture in made:
            assert capture is None or capture.join(30.0)
        files = sorted(output.glob("attnscope-captures/*/*"))
        return [read_call(file) for file in files]

    return run


def test_nothing_is_written_unless_layers_are_chosen(
    captured: Any, tmp_path: Path, receiver: Any
) -> None:
    assert captured() == []
    assert not (tmp_path / "output").exists()


def test_chosen_layers_and_steps_with_their_places(
    captured: Any, flux: Any, receiver: Any
) -> None:
    calls = captured(capture_layers="double.1,single.2-3", capture_steps="0,2-9")
    run_id = receiver.finished()[0].run_id
    assert [(call.info.step, call.info.layer) for call in calls] == [
        (step, layer) for step in (0, 2, 3) for layer in ("double.1", "single.2", "single.3")
    ]
    sigmas = {step.step: step.sigma for step in receiver.steps()}
    for call in calls:
        info = call.info
        assert (info.run_id, info.model) == (run_id, "Flux")
        assert info.sigma == pytest.approx(sigmas[info.step])
        # 16 text tokens, and a latent of 8×8 pixels in patches of 2×2
        assert (info.text_tokens, info.rows, info.columns) == (16, 4, 4)
        assert (info.dtype, info.mask, info.call) == ("float32", False, 0)
        assert call.query.shape == call.key.shape == call.value.shape == (1, 2, 32, 128)
        assert info.scale == pytest.approx(128**-0.5)


def test_the_tensors_are_those_of_the_call(
    captured: Any, flux: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model got back is the exact attention of what was captured."""
    import comfy.ldm.flux.math as flux_math

    outputs: list[torch.Tensor] = []
    real = flux_math.optimized_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        outputs.append(real(*args, **kwargs).clone())
        return outputs[-1]

    monkeypatch.setattr(flux_math, "optimized_attention", watched)
    (call,) = captured(capture_layers="single.1", capture_steps="1")
    exact = reference_attention(call.query, call.key, call.value, call.info.scale)
    expected = exact.transpose(1, 2).reshape(1, 32, 256).float()
    theirs = outputs[len(LAYERS) + LAYERS.index("single.1")]
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)


def test_sampling_is_bit_identical(captured: Any, flux: Any, prepared: Any) -> None:
    plain = sample(flux)
    assert torch.equal(plain, sample(prepared("exact", capture_layers="all")))


def test_cfg_and_heun_make_several_calls_of_a_step(captured: Any) -> None:
    calls = captured(
        {"sampler": "heun", "cfg": 3.0, "steps": 2, "tokens": (16, 24)},
        capture_layers="single.0",
        capture_steps="0",
    )
    assert [call.info.call for call in calls] == [0, 1, 2, 3]
    # Conditions of different length come one by one, each with its own text.
    assert sorted({call.info.text_tokens for call in calls}) == [16, 24]
    assert all(call.query.shape[2] == call.info.text_tokens + 16 for call in calls)


def test_a_batch_keeps_its_size(captured: Any) -> None:
    (call,) = captured({"batch": 3}, capture_layers="double.0", capture_steps="1")
    assert call.query.shape[0] == 3


def test_the_bound_holds(captured: Any, caplog: pytest.LogCaptureFixture, flux: Any) -> None:
    # 1 MB; a call of 96×96 latent pixels is 3 · 2,320 · 256 · 4 bytes.
    plain = sample(flux, side=96)
    assert captured({"side": 96}, capture_layers="all", capture_max_mb=1) == []
    assert "capture_max_mb" in caplog.text
    per_call = 3 * (16 + 64) * 256 * 4
    calls = captured({"side": 16}, capture_layers="all", capture_max_mb=1)
    assert len(calls) == 10**6 // per_call
    assert plain.isfinite().all()


@pytest.mark.parametrize("where", ["copy", "write", "model"])
def test_a_failure_is_logged_once_and_ends_the_capture(
    captured: Any, flux: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    where: str, tmp_path: Path,
) -> None:  # fmt: skip
    from attnscope.comfy_plugin import capture

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left on device")

    if where == "model":
        (tmp_path / "output").write_text("a file where the folder should be", encoding="utf-8")
    else:
        monkeypatch.setattr(capture, {"copy": "_copy", "write": "write_call"}[where], broken)
    assert captured(capture_layers="all") == []
    found = [r for r in caplog.records if "capture failed" in r.getMessage()]
    assert len(found) == 1


def test_other_variants_capture_nothing() -> None:
    from attnscope.attention.settings import TaylorSettings
    from attnscope.comfy_plugin.capture import capture_for

    assert capture_for(TaylorSettings(), "0" * 32, model=str) is None


def test_the_node_takes_the_text_and_refuses_what_it_can_not_read(comfyui: Path) -> None:
    from attnscope.attention.settings import MonitorSettings
    from attnscope.comfy_plugin.nodes.inputs import read_settings, settings_inputs

    inputs = {item.id: item for item in settings_inputs(MonitorSettings)}
    assert inputs["capture_layers"].io_type == "STRING"
    assert inputs["capture_steps"].default == "all"
    with pytest.raises(ValueError, match=r"capture_steps: '7-3' ends before it begins; allowed:"):
        read_settings(MonitorSettings, {"capture_steps": "7-3"})
