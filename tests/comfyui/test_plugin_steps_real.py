"""Steps, evaluations and model calls of ComfyUI's own samplers on the small Flux."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux import LAYERS, sample

pytestmark = pytest.mark.comfyui

SAMPLERS = {
    "euler": [1, 1, 1, 1],
    "euler_ancestral": [1, 1, 1, 1],
    "heun": [2, 2, 2, 1],
    "heunpp2": [3, 3, 2, 1],
    "dpm_2": [2, 2, 2, 1],
    "dpm_2_ancestral": [2, 2, 2, 1],
    "dpmpp_2s_ancestral": [2, 2, 2, 1],
    "dpmpp_sde": [2, 2, 2, 1],
    "dpmpp_2m": [1, 1, 1, 1],
    "dpmpp_2m_sde": [1, 1, 1, 1],
    "dpmpp_3m_sde": [1, 1, 1, 1],
    "uni_pc": [1, 1, 1, 1],
    "uni_pc_bh2": [1, 1, 1, 1],
    "lms": [1, 1, 1, 1],
    "lcm": [1, 1, 1, 1],
    "ipndm": [1, 1, 1, 1],
    "deis": [1, 1, 1, 1],
    "res_multistep": [1, 1, 1, 1],
    "gradient_estimation": [1, 1, 1, 1],
    "er_sde": [1, 1, 1, 1],
    "seeds_2": [2, 2, 2, 1],
    "seeds_3": [3, 3, 3, 1],
    "sa_solver": [1, 1, 1, 1],
    "sa_solver_pece": [1, 2, 2, 2],
    "ddim": [1, 1, 1, 1],
    "ddpm": [1, 1, 1, 1],
}


def told(receiver: Any, index: int = -1) -> tuple[list[int], list[int]]:
    """Steps and their model calls, after checking that the layers agree with them."""
    steps = receiver.steps(index)
    for step in steps:
        assert tuple(step.layers.layer) == LAYERS
        assert set(step.layers.calls) == {step.model_calls}
    return [step.step for step in steps], [step.model_calls for step in steps]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_holds_its_evaluations(sampler: str, prepared: Any, receiver: Any) -> None:
    sample(prepared("exact", quality_samples=0), sampler=sampler)
    events = receiver.finished()
    assert told(receiver) == ([0, 1, 2, 3], SAMPLERS[sampler])
    started = events[0].sampling
    assert [step.sigma for step in receiver.steps()] == started.sigmas[:-1]
    function = "euler" if sampler == "ddim" else sampler.replace("uni_pc", "unipc")
    assert started.sampler == function
    assert started.seed == 7
    assert [event.seq for event in events] == list(range(len(events)))
    assert events[-1].status == "completed"


@pytest.mark.parametrize(("sampler", "counts"), [("heun", [2, 2, 2, 1]), ("euler", [1] * 4)])
@pytest.mark.parametrize(("tokens", "factor"), [((16, 16), 1), ((16, 15), 2)])
def test_guidance_adds_model_calls_and_no_evaluations(
    sampler: str,
    counts: list[int],
    tokens: tuple[int, int],
    factor: int,
    prepared: Any,
    receiver: Any,
) -> None:
    sample(prepared("exact", quality_samples=0), sampler=sampler, cfg=3.0, tokens=tokens)
    receiver.finished()
    assert told(receiver) == ([0, 1, 2, 3], [factor * count for count in counts])
    assert receiver.run()[0].sampling.cfg == 3.0


@pytest.mark.parametrize(("sampler", "counts"), [("heun", [2, 2]), ("dpmpp_sde", [2, 2])])
def test_a_schedule_that_stops_above_zero(
    sampler: str, counts: list[int], prepared: Any, receiver: Any
) -> None:
    sample(prepared("exact", quality_samples=0), sampler=sampler, last=2)
    receiver.finished()
    assert told(receiver) == ([0, 1], counts)
    assert receiver.run()[0].sampling.sigmas[-1] > 0


def test_a_schedule_that_starts_late(prepared: Any, receiver: Any) -> None:
    model = prepared("exact", quality_samples=0)
    sample(model, start=1, last=3, sampler="euler")
    receiver.finished()
    assert told(receiver) == ([0, 1], [1, 1])
    assert receiver.run()[0].sampling.sigmas == [0.75, 0.5, 0.25]


def test_image_to_image(prepared: Any, receiver: Any) -> None:
    begin = {"samples": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))}
    sample(prepared("exact", quality_samples=0), denoise=0.5, start_latent=begin, sampler="heun")
    receiver.finished()
    assert told(receiver) == ([0, 1, 2, 3], [2, 2, 2, 1])
    assert receiver.run()[0].sampling.sigmas[0] < 1.0


def test_a_batch_of_two_is_one_call(prepared: Any, receiver: Any) -> None:
    sample(prepared("exact", quality_samples=0), batch=2, cfg=2.0)
    receiver.finished()
    assert told(receiver) == ([0, 1, 2, 3], [1, 1, 1, 1])
    assert receiver.run()[0].sampling.latent_shape == [2, 16, 8, 8]


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
def test_samplers_that_leave_the_schedule_keep_their_own_count(
    sampler: str, prepared: Any, receiver: Any
) -> None:
    sample(prepared("exact", quality_samples=0), sampler=sampler, steps=4, last=3)
    receiver.finished()
    steps, calls = told(receiver)
    assert steps == list(range(len(steps)))
    if sampler == "dpm_fast":
        assert calls == [2, 1]
    sigmas = [step.sigma for step in receiver.steps()]
    assert sigmas == sorted(sigmas, reverse=True)
