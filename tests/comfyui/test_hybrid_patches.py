"""Flux's attention is patched while a hybrid model runs, and at no other time; its results."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flux as small
import pytest
import state
import torch
from flux import acting, small_flux

from attnscope.comfy_plugin.layouts import read_call

pytestmark = pytest.mark.comfyui

SMALL = {"min_tokens": 1, "local_window": 4, "local_chunk": 16, "global_dim": 8}


def sample(model: Any, **options: Any) -> torch.Tensor:
    """With more tokens than a window holds: 64 of the image and 16 of text."""
    return small.sample(model, side=16, **options)


@pytest.fixture(autouse=True)
def output(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's output folder, one of the test's own."""
    import folder_paths

    folder = tmp_path / "output"
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    return folder


@pytest.fixture(autouse=True)
def as_before(comfyui: Path) -> Iterator[dict[str, Any]]:
    """Both bindings, which every test has to leave as they were."""
    before = bindings()
    yield before
    assert bindings() == before


@pytest.fixture
def hybrid(prepared: Any) -> Callable[..., Any]:
    """The hybrid node on the small Flux."""
    return lambda **changes: prepared("hybrid", **(SMALL | changes))


def bindings() -> dict[str, Any]:
    import comfy.ldm.flux.layers
    import comfy.ldm.flux.math

    return {
        "math": comfy.ldm.flux.math.attention,
        "layers": comfy.ldm.flux.layers.attention,
    }


def bind(function: Any) -> None:
    import comfy.ldm.flux.layers
    import comfy.ldm.flux.math

    comfy.ldm.flux.math.attention = comfy.ldm.flux.layers.attention = function


def is_patched() -> bool:
    return "attnscope" in str(inspect.getmodule(bindings()["layers"].__code__))


def paths(receiver: Any, step: int = 0) -> set[str]:
    return set(receiver.steps()[step].layers.path)


def reasons(receiver: Any) -> set[str]:
    return {item.reason for step in receiver.steps() for item in step.reasons}


def test_it_runs_and_both_bindings_are_put_back(
    flux: Any, hybrid: Any, receiver: Any, as_before: dict[str, Any]
) -> None:
    seen: list[bool] = []
    model = acting(hybrid(), {1: lambda: seen.append(is_patched())})
    plain, ours = sample(flux), sample(model)
    assert seen == [True]
    assert bindings() == as_before
    receiver.finished()
    assert paths(receiver) == {"hybrid"}
    nmse = receiver.steps()[0].layers.metrics["nmse"]
    assert all(0.0 < value < 0.5 for value in nmse)
    difference = (ours - plain).norm() / plain.norm()
    assert 1e-5 < float(difference) < 0.2


def test_with_all_tokens_near_the_picture_is_the_models_own(flux: Any, hybrid: Any) -> None:
    assert torch.equal(sample(flux), sample(hybrid(local_window=0)))


def test_query_and_key_before_rope_are_what_the_block_computed(
    hybrid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.ldm.flux.math import apply_rope

    from attnscope.attention.hybrid.variant import HybridVariant

    given: list[Any] = []
    rotations: list[Any] = []
    original = HybridVariant.attend

    def watched(self: Any, query: Any, key: Any, value: Any, call: Any) -> Any:
        rotated = apply_rope(*call.pre_rope, rotations[-1])
        given.append(torch.equal(rotated[0], query) and torch.equal(rotated[1], key))
        assert not torch.equal(call.pre_rope[0], query)
        return original(self, query, key, value, call)

    monkeypatch.setattr(HybridVariant, "attend", watched)
    core = bindings()["layers"]

    def listening(q: Any, k: Any, v: Any, pe: Any, mask: Any = None,
                  transformer_options: Any = {}) -> Any:  # noqa: B006  # fmt: skip
        rotations.append(pe)
        return core(q, k, v, pe, mask=mask, transformer_options=transformer_options)

    bind(listening)
    try:
        sample(hybrid(), steps=2)
    finally:
        bind(core)
    assert given == [True] * 12


@pytest.mark.parametrize("how", ["exception", "interrupt", "before the sampler"])
def test_bindings_are_put_back_however_a_run_ends(
    flux: Any, hybrid: Any, receiver: Any, plugin: Any, interruptible: None, how: str
) -> None:
    import comfy.model_management as management

    def fail(*_: Any) -> None:
        raise ValueError("the model broke")

    acts = {"exception": {2: fail}, "interrupt": {1: management.interrupt_current_processing}}
    model = acting(hybrid(), acts.get(how, {}))
    if how == "before the sampler":
        from comfy.patcher_extension import CallbacksMP

        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "another", fail)
    sample(flux)
    before = state.of_process(flux, model)
    with pytest.raises((ValueError, management.InterruptProcessingException)):
        sample(model)
    assert plugin.link.join(20.0)
    assert state.differences(before, state.of_process(flux, model)) == []


def test_two_models_in_one_prompt_and_a_clone(
    flux: Any, hybrid: Any, prepared: Any, receiver: Any
) -> None:
    first, second = hybrid(), prepared("hybrid", model=small_flux(1), **SMALL)
    alone = sample(first)
    sample(second)
    assert torch.equal(alone, sample(first.clone()))
    assert torch.equal(sample(flux), sample(prepared("exact")))
    receiver.finished(4)


def test_a_later_node_of_ours_takes_the_patch_away(hybrid: Any, prepared: Any) -> None:
    from comfy.patcher_extension import CallbacksMP

    seen: list[bool] = []
    later = prepared("taylor", model=hybrid(), min_tokens=1)
    assert not later.get_callbacks(CallbacksMP.ON_PRE_RUN, "attnscope")
    sample(acting(later, {0: lambda: seen.append(is_patched())}), steps=2)
    assert seen == [False]


def test_another_models_run_within_ours_is_left_alone(
    flux: Any, hybrid: Any, prepared: Any, receiver: Any, as_before: dict[str, Any]
) -> None:
    other = small_flux(1)
    plain, inside, patched = sample(other, steps=2), [], []

    def nest() -> None:
        patched.append(is_patched())
        inside.append(sample(other, steps=2))
        inside.append(sample(prepared("hybrid", model=other, **SMALL), steps=2))
        patched.append(is_patched())

    alone = sample(hybrid())
    assert torch.equal(alone, sample(acting(hybrid(), {1: nest})))
    assert torch.equal(inside[0], plain)
    assert torch.equal(inside[1], sample(prepared("hybrid", model=other, **SMALL), steps=2))
    assert patched == [True, True]
    assert bindings() == as_before


def counting(core: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """Another pack's patch."""

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return core(*args, **kwargs)

    return theirs


def test_another_packs_patch_below_ours_stays_and_serves(hybrid: Any, receiver: Any) -> None:
    alone = sample(hybrid())
    core, calls = bindings()["layers"], []
    below = counting(core, calls)
    bind(below)
    try:
        assert torch.equal(alone, sample(hybrid()))
        assert bindings() == {"math": below, "layers": below}
    finally:
        bind(core)
    assert len(calls) == 24
    receiver.finished(2)


def test_another_packs_patch_on_top_of_ours_stays_and_ours_goes_with_the_next_run(
    flux: Any, hybrid: Any, receiver: Any, as_before: dict[str, Any]
) -> None:
    alone, plain = sample(hybrid()), sample(flux)
    calls: list[int] = []
    kept: dict[str, Any] = {}

    def put_on_top() -> None:
        kept["ours"] = bindings()["layers"]
        bind(counting(kept["ours"], calls))

    assert torch.equal(alone, sample(acting(hybrid(), {1: put_on_top})))
    top = bindings()["layers"]
    assert top is not kept["ours"] and not is_patched()
    # Theirs still hands on to ours, which now only hands on itself.
    count = len(calls)
    assert torch.equal(sample(flux), plain)
    assert len(calls) == count + 24
    assert torch.equal(sample(hybrid()), alone)
    assert bindings()["layers"] is top
    # They put back what they found: ours. The next run of ours takes that out.
    bind(kept["ours"])
    assert torch.equal(sample(flux), plain)
    assert torch.equal(sample(hybrid()), alone)
    assert bindings() == as_before


def test_a_patch_below_that_goes_during_our_run_is_not_put_back(
    hybrid: Any, receiver: Any, as_before: dict[str, Any]
) -> None:
    core = bindings()["layers"]
    bind(counting(core, []))
    sample(acting(hybrid(), {2: lambda: bind(core)}))
    assert bindings() == as_before
    receiver.finished()
    assert paths(receiver, 1) == {"hybrid"}
    assert paths(receiver, 3) == {"exact"}
    assert reasons(receiver) == {"pre_rope"}


def with_transformer(q: Any, k: Any, v: Any, pe: Any, mask: Any = None,
                     transformer_options: Any = {}) -> Any:  # noqa: B006  # fmt: skip
    """0.29 and 0.33: as 0.3.75, but rotation comes from elsewhere."""
    from comfy.ldm.flux.math import apply_rope
    from comfy.ldm.modules.attention import optimized_attention

    if pe is not None:
        q, k = apply_rope(q, k, pe)
    return optimized_attention(
        q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=transformer_options
    )


class Container:
    """0.38: holds a tensor until it is taken, once."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def peek(self) -> Any:
        assert self.tensor is not None, "consumed"
        return self.tensor

    def take(self) -> Any:
        tensor, self.tensor = self.peek(), None
        return tensor


def with_containers(q: Any, k: Any, v: Any, pe: Any, mask: Any = None,
                    transformer_options: Any = {},  # noqa: B006
                    preferred_attention: Any = None) -> Any:  # fmt: skip
    """0.38: query, key and value may come in containers."""
    if isinstance(q, Container):
        q, k, v = q.take(), k.take(), v.take()
    assert preferred_attention is None
    return with_transformer(q, k, v, pe, mask, transformer_options)


def contained(q: Any, k: Any, v: Any, **named: Any) -> Any:
    """A caller of 0.38."""
    return with_containers(*map(Container, (q, k, v)), **named)


def in_place(q: Any, k: Any, v: Any, pe: Any, mask: Any = None,
             transformer_options: Any = {}) -> Any:  # noqa: B006  # fmt: skip
    """Rotation that overwrites query and key."""
    from comfy.ldm.flux.math import apply_rope

    for tensor, rotated in zip((q, k), apply_rope(q, k, pe), strict=True):
        tensor.copy_(rotated)
    return with_transformer(q, k, v, None, mask, transformer_options)


@pytest.mark.parametrize("core", [with_transformer, with_containers])
def test_signatures_of_other_versions(hybrid: Any, core: Any) -> None:
    alone = sample(hybrid())
    before = bindings()["layers"]
    bind(core)
    try:
        assert torch.equal(alone, sample(hybrid()))
        assert bindings() == {"math": core, "layers": core}
    finally:
        bind(before)


def test_containers_stay_unconsumed(comfyui: Path) -> None:
    from attnscope.comfy_plugin.pre_rope import OPTION, FluxPatch, PreRope

    held: list[Any] = []
    carrier = PreRope()
    tensors = [torch.randn(1, 2, 9, 128) for _ in range(3)]

    def override(func: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        held.append(carrier.of(read_call((q, k, v, *args), kwargs)))
        return func(q, k, v, *args, **kwargs)

    patch, before = FluxPatch(), bindings()["layers"]
    options = {OPTION: carrier, "optimized_attention_override": override}
    bind(with_containers)
    try:
        patch.pre_run(patch)
        containers = [Container(tensor) for tensor in tensors]
        pe = torch.eye(2).expand(1, 1, 9, 64, 2, 2)
        bindings()["layers"](*containers, pe=pe, transformer_options=options)
        assert all(container.tensor is None for container in containers)
        patch.cleanup(patch)
        assert bindings()["layers"] is with_containers
    finally:
        bind(before)
    assert held[0][0] is tensors[0] and held[0][1] is tensors[1]


def test_rotation_in_place_costs_one_exact_call_and_then_copies(
    hybrid: Any, receiver: Any
) -> None:
    alone = sample(hybrid())
    receiver.finished()
    before = bindings()["layers"]
    bind(in_place)
    try:
        second = sample(hybrid())
    finally:
        bind(before)
    receiver.finished(2)
    assert [step.layers.path.count("hybrid") for step in receiver.steps()] == [5, 6, 6, 6]
    assert reasons(receiver) == {"pre_rope"}
    assert float((second - alone).norm() / alone.norm()) < 0.05


@pytest.mark.parametrize(
    ("strange", "why"),
    [
        (lambda query, key, value, rope: None, "begins with (query, key, value, rope)"),
        (lambda q, k, v, pe, mask=None: None, "takes no transformer_options"),
        (None, "is not a function"),
    ],
)
def test_an_unfamiliar_binding_is_left_alone_and_said(
    hybrid: Any, plugin: Any, monkeypatch: pytest.MonkeyPatch, receiver: Any,
    caplog: pytest.LogCaptureFixture, strange: Any, why: str,
) -> None:  # fmt: skip
    import comfy.ldm.flux.math

    from attnscope.comfy_plugin import pre_rope

    monkeypatch.setattr(pre_rope.FLUX_PATCH, "_declined", set())
    monkeypatch.setattr(comfy.ldm.flux.math, "attention", strange)
    before = bindings()
    for _ in range(2):
        sample(hybrid(), steps=2)
    assert bindings() == before
    receiver.finished(2)
    assert paths(receiver) == {"exact"}
    assert reasons(receiver) == {"pre_rope"}
    said = [r for r in caplog.records if "run exact" in r.message and why in r.getMessage()]
    assert len(said) == 1
    monkeypatch.undo()


def test_our_own_breakdown_leaves_sampling_as_it_was(
    flux: Any, hybrid: Any, plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope.comfy_plugin.pre_rope import FluxPatch

    def broken(*_: Any) -> Any:
        raise RuntimeError("ours")

    plain = sample(flux)
    with monkeypatch.context() as patch:
        patch.setattr(FluxPatch, "_install", broken)
        assert torch.equal(plain, sample(hybrid()))


def test_two_threads_hold_their_own(comfyui: Path) -> None:
    from attnscope.comfy_plugin.layouts import AttentionCall
    from attnscope.comfy_plugin.pre_rope import PreRope

    carrier, barrier = PreRope(), threading.Barrier(2)
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        query, key = torch.full((2, 1, 1, 5, 8), float(number))
        with carrier.holding(query, key, rotated=True):
            barrier.wait(20)
            rotated = AttentionCall(query + 1, key + 1, key, None, 1.0, False)
            found[number] = carrier.of(rotated)
            barrier.wait(20)
        assert carrier.of(rotated) is None

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [float(found[number][0].mean()) for number in (1, 2)] == [1.0, 2.0]


def test_clean_up_may_come_more_often_than_a_run_and_users_are_counted(comfyui: Path) -> None:
    from attnscope.comfy_plugin.pre_rope import FluxPatch

    class User:
        pass

    patch, one, other, core = FluxPatch(), User(), User(), bindings()
    patch.cleanup(one)
    patch.pre_run(one)
    patch.pre_run(other)
    patch.pre_run(other)
    patch.cleanup(one)
    patch.cleanup(one)
    assert is_patched()
    patch.cleanup(other)
    assert is_patched()
    patch.cleanup(other)
    assert bindings() == core
    # A model that went without saying so doesn't keep the patch.
    patch.pre_run(one)
    del one
    patch.cleanup(other)
    assert bindings() == core


def test_results_are_written_once_a_run(
    hybrid: Any, prepared: Any, receiver: Any, plugin: Any, output: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", logger="attnscope")
    sample(hybrid(global_weight=0.5))
    sample(hybrid(log_quality_stats=False))
    sample(hybrid(quality_samples=0))
    sample(prepared("taylor", min_tokens=1))
    receiver.finished(4)
    assert plugin.link.join(20.0)
    lines = (output / "hybrid-attention-results.jsonl").read_text().splitlines()
    assert len(lines) == 1
    record = json.loads(lines[0])
    assert record["run_id"] == next(iter(receiver.events))
    assert record["status"] == "completed"
    assert record["config"]["global_weight"] == 0.5
    assert record["config"]["local_window"] == 4
    quality = record["quality"]
    assert 0.0 < quality["nmse_mean"] <= quality["nmse_max"] < 0.5
    assert quality["cosine_min"] <= quality["cosine_mean"] <= 1.0
    assert (quality["calls"], quality["calls_hybrid"], quality["calls_measured"]) == (24, 24, 6)
    meta = record["meta"]
    assert (meta["latent_h"], meta["latent_w"], meta["q_len"], meta["steps"]) == (16, 16, 80, 4)
    assert meta["head_dim"] == 128
    assert len(meta["sigmas"]) == 5 and meta["sigma"] == meta["sigmas"][3]
    said = [r.getMessage() for r in caplog.records if "hybrid quality" in r.getMessage()]
    assert len(said) == 1
    assert any('"global_weight": 0.5' in r.getMessage() for r in caplog.records)


def test_a_results_file_that_cannot_be_written_costs_nothing_else(
    hybrid: Any, receiver: Any, plugin: Any, output: Path
) -> None:
    output.write_text("in the way")
    sample(hybrid())
    assert receiver.finished()[-1].status == "completed"
