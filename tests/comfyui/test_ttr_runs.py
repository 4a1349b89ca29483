"""Flux2TTR in the real ComfyUI: it distills, it serves, and the image is always finished."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flux import LAYERS, acting, sample, small_flux

from attnscope.attention.ttr import checkpoint, pool, variant
from attnscope.attention.ttr.residual import ResidualStudent
from attnscope.attention.ttr.student import Student
from attnscope.attention.ttr.trainer import Trainer

pytestmark = pytest.mark.comfyui

SIDE = 64
"""Latent pixels, 32×32 tokens: 4×4 tiles, so that a window of radius 1 leaves some far."""

SMALL: dict[str, Any] = {
    "features": 16, "batch_queries": 32, "query_samples": 48, "heldout_queries": 16,
    "progress_every": 2, "ready_min_updates": 2, "ready_threshold": 0.5, "quality_samples": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ComfyUI's output folder, and a process that knows no students yet."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    monkeypatch.setattr(variant, "POOL", pool.Pool())
    yield tmp_path / "output" / "attnscope"
    folder_paths.set_output_directory(before)


@pytest.fixture(scope="module")
def exact(flux: Any) -> torch.Tensor:
    """What the model makes by itself."""
    return sample(flux, side=SIDE)


@pytest.fixture
def ttr(prepared: Callable[..., Any]) -> Callable[..., Any]:
    """The small Flux behind the node."""
    return lambda **settings: prepared("ttr", **{**SMALL, **settings})


def events(receiver: Any, index: int = -1) -> list[Any]:
    return [event for event in receiver.run(index) if event.kind == "student_event"]


def kinds(receiver: Any, index: int = -1) -> list[str]:
    return [event.event.value for event in events(receiver, index)]


def reasons(receiver: Any, index: int = -1) -> set[str]:
    return {r.reason for step in receiver.steps(index) for r in step.reasons}


def test_it_distills_at_no_cost_to_the_image_then_serves_what_is_ready(
    ttr: Any, receiver: Any, exact: torch.Tensor, folder: Path
) -> None:
    assert torch.equal(sample(ttr(updates_per_call=2), side=SIDE), exact)
    run = receiver.finished()
    assert run[0].variant == "ttr" and run[-1].kind == "run_ended"
    batches = [event.updates for event in run if event.kind == "students_updated"]
    made = [pair for b in batches for pair in zip(b.layer, b.update, strict=True)]
    assert sorted(made) == sorted((layer, n) for layer in LAYERS for n in range(1, 9))
    assert any(value is not None for b in batches for value in b.metrics.get("nmse", ()))
    assert reasons(receiver) == {"distilling"}
    assert kinds(receiver).count("ready") == len(LAYERS)
    (file,) = folder.iterdir()
    assert events(receiver)[-1].event.value == "checkpoint_saved"
    assert str(file) in events(receiver)[-1].detail
    info = checkpoint.read_info(file)
    assert {layer.updates for layer in info.layers.values()} == {8}

    served = sample(ttr(mode="serve", quality_every=1), side=SIDE)
    receiver.finished(2)
    assert not torch.equal(served, exact)
    assert (served - exact).norm() < 0.05 * exact.norm()
    for step in receiver.steps():
        assert step.layers.path == ["ttr"] * len(LAYERS)
        assert all(0 < value < 0.5 for value in step.layers.metrics["nmse"])
    # Nothing is taught or written while serving.
    assert kinds(receiver) == [] and checkpoint.read_info(file) == info


def test_what_is_not_ready_runs_exact_and_says_so(
    ttr: Any, receiver: Any, exact: torch.Tensor
) -> None:
    assert torch.equal(sample(ttr(mode="serve"), side=SIDE), exact)
    receiver.finished()
    assert reasons(receiver) == {"not_ready"}
    (missing,) = events(receiver)
    assert missing.event.value == "checkpoint_failed" and "distill first" in missing.detail
    sample(ttr(ttr_block_type="single"), side=SIDE)
    served = sample(ttr(mode="serve"), side=SIDE)
    receiver.finished(3)
    assert not torch.equal(served, exact)
    for step in receiver.steps():
        paths = dict(zip(step.layers.layer, step.layers.path, strict=True))
        assert {paths["double.0"], paths["double.1"]} == {"exact"}
        assert {path for layer, path in paths.items() if "single" in layer} == {"ttr"}


@pytest.mark.parametrize("how", [{"sampler": "euler_ancestral"}, {"cfg": 3.0, "batch": 2}])
def test_samplers_that_draw_noise_and_guidance_are_left_alone(
    ttr: Any, flux: Any, how: dict[str, Any]
) -> None:
    plain = sample(flux, side=32, **how)
    assert torch.equal(sample(ttr(), side=32, **how), plain)


def test_the_preview_shows_the_students_and_still_learns_from_the_model(
    ttr: Any, receiver: Any, exact: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = sample(ttr(training_preview=True, ready_threshold=1e-6), side=SIDE)
    receiver.finished()
    assert not torch.equal(shown, exact)
    paths = [step.layers.path for step in receiver.steps()]
    assert paths[0] == ["exact"] * len(LAYERS) and paths[-1] == ["ttr"] * len(LAYERS)
    (saved,) = [e for e in events(receiver) if e.event.value == "checkpoint_saved"]
    assert f"{4 * len(LAYERS)} updates" in saved.detail


def test_another_nodes_attention_is_the_teacher(
    ttr: Any, flux: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = variant.TtrVariant.observe

    def observe(self: Any, query: Any, key: Any, value: Any, out: Any, call: Any) -> None:
        seen.append((value, out))
        original(self, query, key, value, out, call)

    monkeypatch.setattr(variant.TtrVariant, "observe", observe)
    clone = flux.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda func, *args, **kwargs: (
        func(*args, **kwargs) * 0 + 7
    )
    sample(prepared("ttr", model=clone, **SMALL), steps=1)
    assert len(seen) == len(LAYERS)
    assert all(out.shape == value.shape and (out == 7).all() for value, out in seen)


def test_two_models_in_one_prompt_and_the_same_prompt_twice(
    ttr: Any, prepared: Any, receiver: Any, folder: Path
) -> None:
    other = prepared("ttr", model=small_flux(3), **SMALL)
    first = ttr()
    for model in (first, other, first, other):
        sample(model, steps=2, side=32)
    receiver.finished(4)
    files = sorted(folder.iterdir())
    assert len(files) == 2
    for file in files:
        assert {layer.updates for layer in checkpoint.read_info(file).layers.values()} == {4}


def test_a_runtime_that_is_gone_recovers_from_settings_and_checkpoint(
    ttr: Any, receiver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "KEPT_BYTES", 0)
    model = ttr()
    sample(model, side=32)
    sample(model, side=32)
    receiver.finished(2)
    assert kinds(receiver, 1)[:2] == ["recovered", "checkpoint_loaded"]
    assert f"{8 * len(LAYERS)} updates" in events(receiver)[-1].detail


def lacking(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def broken(*_: Any, **__: Any) -> Any:
    raise ValueError("it broke")


@pytest.mark.parametrize("fault", [lacking, broken])
@pytest.mark.parametrize("where", ["start", "predict", "weights"])
def test_training_that_fails_never_costs_the_image(
    ttr: Any, receiver: Any, exact: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
    where: str, fault: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(ResidualStudent, where, fault)
    assert torch.equal(sample(ttr(progress_every=1), side=SIDE), exact)
    receiver.finished()
    told = set(kinds(receiver))
    assert "training_off" in told
    assert ("out_of_memory" if fault is lacking else "update_failed") in told


@pytest.mark.parametrize("fault", [lacking, broken])
def test_serving_that_fails_runs_exact_with_the_reason(
    ttr: Any, receiver: Any, exact: torch.Tensor, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    sample(ttr(), side=SIDE)
    monkeypatch.setattr(ResidualStudent, "serve", fault)
    assert torch.equal(sample(ttr(mode="serve"), side=SIDE), exact)
    receiver.finished(2)
    assert reasons(receiver) == {"out_of_memory" if fault is lacking else "error"}


def test_a_lack_of_memory_in_serving_is_tried_again_with_smaller_chunks(
    ttr: Any, receiver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(ttr(), side=SIDE)
    chunks: list[int] = []
    original = ResidualStudent.serve

    def serve(self: Any, *args: Any, **kwargs: Any) -> Any:
        chunks.append(args[5])
        return lacking() if args[5] > 32 else original(self, *args, **kwargs)

    monkeypatch.setattr(ResidualStudent, "serve", serve)
    sample(ttr(mode="serve", ttr_block_type="double", ttr_layer_end=0), side=SIDE)
    receiver.finished(2)
    # Sticky: only the first call tries what is known to fail.
    assert chunks == [128, 64, 32, 32, 32, 32]
    assert kinds(receiver) == ["out_of_memory"] * 2


def test_a_teacher_with_nan_teaches_nothing(
    ttr: Any, receiver: Any, flux: Any, prepared: Any
) -> None:
    clone = flux.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda func, *args, **kwargs: func(
        *args, **kwargs
    ).fill_(torch.nan)
    out = sample(prepared("ttr", model=clone, **SMALL), steps=2)
    assert out.isnan().all(), "as the model makes it"
    receiver.finished()
    assert "teacher_not_finite" in kinds(receiver) and "checkpoint_saved" not in kinds(receiver)


def test_a_student_with_nan_serves_no_second_step(
    ttr: Any, receiver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(ttr(), side=SIDE)
    original = ResidualStudent.serve

    def serve(self: Any, *args: Any, **kwargs: Any) -> Any:
        served = original(self, *args, **kwargs)
        served.out[0, 0, 0, 0] = torch.nan
        return served

    monkeypatch.setattr(ResidualStudent, "serve", serve)
    sample(ttr(mode="serve"), side=SIDE)
    receiver.finished(2)
    paths = [set(step.layers.path) for step in receiver.steps()]
    assert paths[0] == {"ttr"} and paths[-1] == {"exact"}
    assert "non_finite" in reasons(receiver)


@pytest.mark.parametrize("mode", ["distill", "serve"])
def test_a_truncated_checkpoint_is_named_and_left_as_it_is(
    ttr: Any, receiver: Any, exact: torch.Tensor, folder: Path, mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = folder / "mine.safetensors"
    sample(ttr(checkpoint="mine"), side=SIDE)
    path.write_bytes(path.read_bytes()[:5000])
    damaged = path.read_bytes()
    assert torch.equal(sample(ttr(checkpoint="mine", mode=mode), side=SIDE), exact)
    receiver.finished(2)
    (failed,) = events(receiver)
    assert failed.event.value == "checkpoint_failed" and failed.detail.startswith(f"{path}: ")
    assert reasons(receiver) == {"checkpoint"}
    assert path.read_bytes() == damaged


def test_a_full_disk_keeps_what_was_learnt_in_memory(
    ttr: Any, receiver: Any, exact: torch.Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        assert torch.equal(sample(ttr(), side=SIDE), exact)
    receiver.finished()
    assert kinds(receiver)[-1] == "checkpoint_failed"
    assert "No space left" in events(receiver)[-1].detail
    assert not list(folder.iterdir())
    sample(ttr(), side=SIDE)
    receiver.finished(2)
    assert f"{8 * len(LAYERS)} updates" in events(receiver)[-1].detail


@pytest.mark.parametrize("where", ["update", "sampling"])
def test_an_interrupt_leaves_a_good_checkpoint(
    ttr: Any, receiver: Any, folder: Path, where: str, interruptible: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import comfy.model_management as management

    model = ttr()
    if where == "update":
        made = iter(range(1000))
        original = Trainer._restore

        def restore(self: Any, before: Any, unless: Any = None) -> None:
            if next(made) == 9:
                raise KeyboardInterrupt
            original(self, before, unless)

        monkeypatch.setattr(Trainer, "_restore", restore)
        with pytest.raises(KeyboardInterrupt):
            sample(model, side=32)
    else:
        stopping = acting(model, {2: management.interrupt_current_processing})
        with pytest.raises(management.InterruptProcessingException):
            sample(stopping, side=32)
    run = receiver.finished()
    assert run[-1].status == "interrupted"
    (file,) = folder.iterdir()
    updates = sum(layer.updates for layer in checkpoint.read(file)[0].layers.values())
    assert updates == (9 if where == "update" else 12)
    monkeypatch.undo()


def test_settings_change_live(ttr: Any, receiver: Any, plugin: Any, folder: Path) -> None:
    from attnscope.wire import RevisionPushed

    model = ttr()

    def push(number: int, **changes: Any) -> Callable[[], None]:
        def act() -> None:
            run = plugin._active[-1]
            settings = {**run.settings.model_dump(mode="json"), **changes}
            run.offer(
                RevisionPushed(
                    id=number, run_id=run.run_id, number=number, variant="ttr", settings=settings
                )
            )

        return act

    acts = {
        1: push(1, training_paused=True),
        2: push(2, training_paused=False, updates_per_call=3, checkpoint_now=1),
        5: push(3, checkpoint="/tmp/elsewhere"),
    }
    sample(acting(model, acts), steps=6, side=32)
    receiver.finished()
    states = [(e.revision_id, e.state) for e in receiver.run() if e.kind == "revision"]
    assert (1, "applied") in states and (2, "applied") in states and (3, "rejected") in states
    by_step: dict[int, int] = {}
    for event in receiver.run():
        if event.kind == "students_updated":
            for step in event.updates.step:
                by_step[step] = by_step.get(step, 0) + 1
    updates = {step: count / len(LAYERS) for step, count in by_step.items()}
    assert updates == {0: 1, 1: 1, 3: 3, 4: 3, 5: 3}, "paused in step 2"
    assert kinds(receiver).count("checkpoint_saved") == 2, "when asked for, and at the end"


def test_a_page_cannot_choose_the_file(
    ttr: Any, receiver: Any, plugin: Any, folder: Path, tmp_path: Path
) -> None:
    from attnscope.attention.settings import TtrSettings
    from attnscope.comfy_plugin.plugin import configuration

    model = ttr(checkpoint="mine")
    page = TtrSettings(**{**SMALL, "checkpoint": str(tmp_path / "stolen"), "updates_per_call": 2})
    shelf = plugin.channel(configuration()).shelf
    shelf.put("ttr", 5, page.model_dump(mode="json"))
    sample(model, side=32)
    started = receiver.finished()[0]
    assert started.settings["updates_per_call"] == 2 and started.settings["checkpoint"] == "mine"
    assert [file.name for file in folder.iterdir()] == ["mine.safetensors"]
    assert not list(tmp_path.glob("stolen*"))


def test_repeated_runs_hold_no_more_tensors(ttr: Any, receiver: Any) -> None:
    model = ttr(replay_mb=4)

    def held() -> int:
        gc.collect()
        objects = gc.get_objects()
        # By their types: `isinstance` asks objects, some of which warn of that.
        tensors = [o for o in objects if issubclass(type(o), torch.Tensor)]
        students = [o for o in objects if issubclass(type(o), Student)]
        assert len(students) == len(LAYERS)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    sizes = []
    for _ in range(5):
        sample(model, side=32, steps=2)
        sizes.append(held())
    assert max(sizes[1:]) - sizes[0] < 10_000
