"""Whole runs: what they report, what they leave alone, and what they leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import state
import torch
from flux import LAYERS, acting, in_prompt, sample, small_flux
from receiver import wait_for

pytestmark = pytest.mark.comfyui

MEASURED = {"nmse", "cosine", "qk_std", "qk_p01", "qk_p50", "qk_p99", "q_norm", "k_norm"}


def test_the_monitor_changes_no_bit(flux: Any, prepared: Any, receiver: Any) -> None:
    assert torch.equal(sample(flux), sample(prepared("exact", quality_every=1)))
    receiver.finished()
    for step in receiver.steps():
        assert step.layers.path == ["exact"] * len(LAYERS)
        assert set(step.layers.metrics) == MEASURED - {"nmse", "cosine"} | {"attn_ms"}
        assert not step.reasons


def test_every_layer_is_measured_when_it_is_its_turn(
    prepared: Any, receiver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope.attention.settings import base

    # Four layers at steps 0 and 4, the other two at steps 1 and 5.
    monkeypatch.setattr(base, "LAYERS_TOGETHER", 4)
    sample(prepared("taylor", min_tokens=1), steps=6)
    receiver.finished()
    for step in receiver.steps():
        wanted = {0: range(4), 1: range(4, 6)}.get(step.step % 4, range(0))
        for name in MEASURED | {"log_mass_bias"}:
            column = step.layers.metrics.get(name, [None] * len(LAYERS))
            measured = [index for index, value in enumerate(column) if value is not None]
            assert measured == list(wanted), (step.step, name)
        assert None not in step.layers.metrics["attn_ms"]
        assert step.layers.tokens_q == step.layers.tokens_k == [32] * len(LAYERS)


def test_taylor_runs_where_its_gates_allow(flux: Any, prepared: Any, receiver: Any) -> None:
    plain = sample(flux)
    model = prepared(
        "taylor", min_tokens=1, taylor_sigma_max=0.6, taylor_block_type="single", label="gated",
        quality_every=1,
    )  # fmt: skip
    assert not torch.equal(plain, sample(model))
    started = receiver.finished()[0]
    assert started.variant == "taylor"
    assert started.label == "gated"
    assert started.settings["taylor_sigma_max"] == 0.6
    assert tuple(started.model.layers) == LAYERS
    paths = {step.step: step.layers.path for step in receiver.steps()}
    assert paths[0] == paths[1] == ["exact"] * 6
    assert paths[2] == paths[3] == ["exact"] * 2 + ["taylor"] * 4
    first, third = receiver.steps()[0], receiver.steps()[2]
    assert {reason.reason for reason in first.reasons} == {"sigma_above_max"}
    assert {(reason.layer, reason.reason) for reason in third.reasons} == {
        ("double.0", "block_type"), ("double.1", "block_type")
    }  # fmt: skip
    assert third.layers.metrics["nmse"][0] is None
    assert third.layers.metrics["nmse"][2] is not None


def test_the_original_model_is_never_touched(flux: Any, prepared: Any, plugin: Any) -> None:
    before = state.of_model(flux)
    model = prepared("taylor", min_tokens=1)
    clone_before = state.of_model(model)
    sample(model)
    assert state.of_model(flux) == before
    assert state.of_model(model) == clone_before


def test_the_later_node_wins_and_nothing_is_recorded_twice(
    flux: Any, prepared: Any, receiver: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "attnscope")
    both = prepared("taylor", model=prepared("exact"), min_tokens=1)
    assert "'taylor' takes the place of 'exact'" in caplog.text
    assert not torch.equal(sample(flux), sample(both))
    receiver.finished()
    assert len(receiver.events) == 1
    assert [step.layers.calls for step in receiver.steps()] == [[1] * 6] * 4
    sample(prepared("exact", model=both))
    started = receiver.finished(2)[0]
    assert len(receiver.events) == 2
    assert started.variant == "exact"


def test_two_samplers_in_one_prompt_are_two_runs(prepared: Any, receiver: Any) -> None:
    model = prepared("exact", quality_samples=0)
    graph = {
        "1": {"class_type": "Loader", "inputs": {"unet_name": "folder/some_flux.safetensors"}},
        "2": {"class_type": "AttnScopeMonitor", "inputs": {"model": ["1", 0]}},
        "3": {
            "class_type": "KSampler",
            "inputs": {"model": ["2", 0], "sampler_name": "ddim", "denoise": 0.75, "seed": 5},
        },
        "4": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "latent_image": ["3", 0]}},
    }
    with in_prompt(graph, "prompt-1", "3"):
        sample(model, sampler="ddim")
    with in_prompt(graph, "prompt-1", "4", 2):
        sample(model, steps=2)
    receiver.finished(2)
    first, second = receiver.run(0)[0], receiver.run(1)[0]
    assert first.run_id != second.run_id
    assert (first.sampling.prompt_id, first.sampling.node_id) == ("prompt-1", "3")
    assert (first.sampling.sampler, first.sampling.denoise) == ("ddim", 0.75)
    assert first.model.name == "some_flux.safetensors"
    assert (second.sampling.node_id, second.sampling.list_index) == ("4", 2)
    assert [len(receiver.steps(0)), len(receiver.steps(1))] == [4, 2]


def test_two_models_at_once(prepared: Any, receiver: Any) -> None:
    """A sampling within a sampling: each run keeps its own steps."""
    inner = prepared("exact", model=small_flux(1), quality_samples=0, label="inner")
    outer = prepared("exact", quality_samples=0, label="outer")
    sample(acting(outer, {1: lambda: sample(inner, steps=2)}))
    receiver.finished(2)
    by_label = {receiver.run(i)[0].label: receiver.steps(i) for i in range(2)}
    assert [step.model_calls for step in by_label["outer"]] == [1, 1, 1, 1]
    assert [step.model_calls for step in by_label["inner"]] == [1, 1]
    assert all(step.layers.calls == [1] * 6 for steps in by_label.values() for step in steps)


def test_an_override_that_another_node_set_is_the_exact_path(
    flux: Any, prepared: Any, receiver: Any
) -> None:
    calls: list[int] = []

    def sage(func: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return func(*args, **kwargs)

    model = prepared("taylor", min_tokens=1, taylor_block_type="double", quality_samples=0)
    # After our node, as well as before it.
    model.model_options["transformer_options"]["optimized_attention_override"] = sage
    sample(model)
    receiver.finished()
    assert len(calls) == 4 * 4
    assert model.model_options["transformer_options"]["optimized_attention_override"] is sage
    assert receiver.steps()[0].layers.path == ["taylor"] * 2 + ["exact"] * 4


def test_an_exception_in_the_model_ends_the_run_and_leaves_nothing(
    flux: Any, prepared: Any, receiver: Any, plugin: Any
) -> None:
    def fail() -> None:
        raise ValueError("the model broke")

    model = acting(prepared("taylor", min_tokens=1), {2: fail})
    sample(flux)
    before = state.of_process(flux, model)
    with pytest.raises(ValueError, match="the model broke"):
        sample(model)
    end = receiver.finished()[-1]
    assert (end.status, end.error) == ("failed", "ValueError: the model broke")
    assert [step.step for step in receiver.steps()] == [0, 1]
    assert plugin.link.join(20.0)
    assert state.differences(before, state.of_process(flux, model)) == []
    assert torch.equal(sample(flux), sample(flux.clone()))


def test_an_interrupt_ends_the_run_and_leaves_nothing(
    flux: Any, prepared: Any, receiver: Any, plugin: Any, interruptible: None
) -> None:
    import comfy.model_management as management

    model = acting(prepared("exact"), {1: management.interrupt_current_processing})
    sample(flux)
    before = state.of_process(flux, model)
    with pytest.raises(management.InterruptProcessingException):
        sample(model)
    assert receiver.finished()[-1].status == "interrupted"
    assert plugin.link.join(20.0)
    assert state.differences(before, state.of_process(flux, model)) == []


def test_a_completed_run_leaves_nothing(
    flux: Any, prepared: Any, receiver: Any, plugin: Any, tmp_path: Any
) -> None:
    model = prepared("taylor", min_tokens=1)
    sample(flux)
    before = state.of_process(flux, model)
    sample(model)
    receiver.finished()
    assert plugin.link.join(20.0)
    assert state.differences(before, state.of_process(flux, model)) == []
    assert list((tmp_path / "spool").glob("*")) == []


def test_our_own_breakdown_leaves_sampling_as_it_was(
    flux: Any, prepared: Any, plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope.comfy_plugin import hooks

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("ours")

    plain = sample(flux)
    for name in ("model_info", "find_place"):
        with monkeypatch.context() as patch:
            patch.setattr(hooks, name, broken)
            assert torch.equal(plain, sample(prepared("exact")))
    for name in ("begin_evaluation", "called_back", "model_called", "record", "start", "end"):
        with monkeypatch.context() as patch:
            patch.setattr(hooks.Run, name, broken)
            assert torch.equal(plain, sample(prepared("exact")))
    assert plugin.link.join(20.0)


def test_a_node_with_nobody_to_tell_still_runs_its_variant(
    flux: Any, prepared: Any, plugin: Any, receiver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNSCOPE_DISABLE", "1")
    assert not torch.equal(sample(flux), sample(prepared("taylor", min_tokens=1)))
    assert not any(prepared("exact").wrappers.values())
    assert not plugin.link.alive
    assert not receiver.events


def test_previews_come_with_their_step(prepared: Any, receiver: Any, plugin: Any) -> None:
    from comfy_execution.progress import get_progress_state
    from PIL import Image

    picture = Image.new("RGB", (1000, 500), "red")
    graph = {"3": {"class_type": "KSampler", "inputs": {}}}

    def show() -> None:
        registry = get_progress_state()
        registry.update_progress("3", 2, 4, ("JPEG", picture, 256))
        registry.update_progress("3", 2, 4, None)
        registry.update_progress("another", 2, 4, ("JPEG", picture, 256))

    model = acting(prepared("exact", quality_samples=0), {1: show})
    with in_prompt(graph, "prompt-2", "3"):
        sample(model)
        assert get_progress_state().handlers == {}
    images = [event for event in receiver.finished() if event.kind == "image"]
    assert [(i.image_kind, i.step, i.width, i.height) for i in images] == [
        ("preview", 1, 256, 128)
    ]
    assert images[0].data.startswith(b"\xff\xd8")


def test_inference_mode_is_no_obstacle(prepared: Any, receiver: Any) -> None:
    with torch.inference_mode():
        sample(prepared("taylor", min_tokens=1))
    receiver.finished()
    assert set(receiver.steps()[0].layers.metrics) >= MEASURED


def test_the_instance_says_what_it_is(prepared: Any, receiver: Any) -> None:
    sample(prepared("exact"))
    receiver.finished()
    instance = wait_for(lambda: receiver.batches[-1].instance)
    assert instance.comfyui_version
    assert instance.torch_version == torch.__version__
    assert instance.device
    assert instance.device_memory_bytes and instance.device_memory_bytes > 2**30
