"""Room in memory, asked of ComfyUI's own `model_management` while it samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from flux import LAYERS, sample

from attnscope.attention import reservation
from attnscope.attention.taylor.attend import Options
from attnscope.attention.taylor.memory import Shape, working_bytes

pytestmark = pytest.mark.comfyui

FACTOR = 1.5
HEADS, HEAD_DIM, TEXT = 2, 128, 16


class Asked(NamedTuple):
    needed: float
    device: torch.device
    kept: list[Any]


def need(side: int) -> int:
    """What the small Flux's joint attention needs, with the factor."""
    tokens = (side // 2) ** 2 + TEXT
    shape = Shape(1, HEADS, tokens, tokens, HEAD_DIM, HEAD_DIM)
    estimate = working_bytes("torch", shape, torch.float32, 3, Options(), torch.device("cpu"))
    return int(FACTOR * estimate)


@pytest.fixture
def asked(comfyui: Any, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Calls of ComfyUI's real `free_memory`, which does its work all the same."""
    import comfy.model_management as management

    calls: list[Asked] = []
    real = management.free_memory

    def free_memory(memory_required: float, device: Any, keep_loaded: Any = ()) -> Any:
        calls.append(Asked(memory_required, device, list(keep_loaded)))
        return real(memory_required, device, keep_loaded=list(keep_loaded))

    monkeypatch.setattr(management, "free_memory", free_memory)
    monkeypatch.setattr(reservation, "LEAST_BYTES", 1)
    return calls


def settings(**changes: Any) -> dict[str, Any]:
    shaped = {"min_tokens": 1, "P": 3, "feature_projection": 0}
    return {**shaped, "memory_reserve_factor": FACTOR, **changes}


def test_comfyui_is_asked_once_per_shape_for_the_estimate(
    asked: list[Asked], prepared: Any, receiver: Any, flux: Any
) -> None:
    model = prepared("taylor", **settings())
    for side in (8, 16):
        before = len(asked)
        sample(model, side=side)
        ours = [call for call in asked[before:] if call.needed == need(side)]
        assert len(ours) == 1, "six layers and four steps of one shape"
        assert ours[0].device == torch.device("cpu")
        # The model that is sampled stays where it is.
        assert any(loaded.model.model is flux.model for loaded in ours[0].kept)
    assert need(8) != need(16)
    receiver.finished(2)
    assert all(step.layers.path == ["taylor"] * len(LAYERS) for step in receiver.steps())


def test_switched_off_nothing_is_asked(asked: list[Asked], prepared: Any, receiver: Any) -> None:
    sample(prepared("taylor", **settings(memory_reserve=False)))
    receiver.finished()
    assert need(8) not in [call.needed for call in asked]


def test_a_failing_free_memory_never_reaches_the_sampler(
    asked: list[Asked],
    prepared: Any,
    receiver: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import comfy.model_management as management

    model = prepared("taylor", **settings())
    wanted = sample(model)
    real = management.free_memory

    def free_memory(memory_required: float, *args: Any, **kwargs: Any) -> Any:
        if memory_required == need(8):
            raise RuntimeError("the driver is gone")
        return real(memory_required, *args, **kwargs)

    monkeypatch.setattr(management, "free_memory", free_memory)
    assert torch.equal(sample(model), wanted)
    assert "could not be asked for" in caplog.text
    receiver.finished(2)
    steps = receiver.steps(1)
    assert all(step.layers.path == ["taylor"] * len(LAYERS) for step in steps)
    assert not any(step.reasons for step in steps)
    # What computed the sums is in every step's report.
    codes = {code for step in steps for code in step.layers.metrics["sums_path"]}
    assert len(codes) == 1 and codes < {1.0, 2.0}
