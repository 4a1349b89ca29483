"""Students over runs: built, taught, released, kept or dropped, and read again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.linear_student import LinearStudent

from attnscope.attention.distillation import Occurrence, StudentEvent
from attnscope.attention.exact import reference_attention
from attnscope.attention.reservation import Reservation
from attnscope.attention.settings import TtrSettings
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr import build, pool, teaching
from attnscope.attention.ttr.checkpoint import CheckpointError
from attnscope.attention.ttr.pool import Pool
from attnscope.attention.ttr.readiness import Rule
from attnscope.attention.ttr.runtime import Layer, Runtime
from attnscope.attention.ttr.student import StudentOptions
from attnscope.attention.ttr.teaching import Observed, Teaching
from attnscope.attention.variant import ModelPrint

CPU = torch.device("cpu")
MODEL = ModelPrint("flux", "abc")
OPTIONS = StudentOptions("residual", 0, 0, 16, 1, 0)
LAYOUT = TokenLayout(4, ((4, 9),))
SETTINGS: dict[str, Any] = {
    "features": 16, "query_samples": 16, "batch_queries": 12, "heldout_queries": 8,
    "progress_every": 3, "training_chunk": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.STUDENTS, "residual", LinearStudent)
    monkeypatch.setattr(LinearStudent, "allocating", staticmethod(lambda what, chunk: None))


def settings(**changes: Any) -> TtrSettings:
    return TtrSettings(**{**SETTINGS, **changes})


def runtime(path: Path | None = None) -> Runtime:
    return Runtime(path, OPTIONS, 0, MODEL)


def observed(seed: int = 0, step: int = 0) -> Observed:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, LAYOUT.tokens, 8, generator=generator).unbind(0)
    return Observed(q, k, v, reference_attention(q, k, v, 0.35).float(), 0.35, LAYOUT, step)


class Taught:
    """A runtime with one layer and its training in one run."""

    def __init__(self, one: Runtime | None = None, **changes: Any) -> None:
        self.settings = settings(**changes)
        self.runtime = runtime() if one is None else one
        self.events: list[Occurrence] = []
        self.asked: list[int] = []
        reservation = Reservation(lambda needed, device: self.asked.append(needed))
        self.teaching = Teaching(self.runtime, self.settings, reservation, self.events.append)

    @property
    def layer(self) -> Layer:
        return self.runtime.layer("single.0", 2, 8, CPU)

    def teach(self, calls: int, seed: Callable[[int], int] = lambda turn: turn) -> list[Any]:
        updates = []
        for turn in range(calls):
            with torch.inference_mode():
                self.teaching.teach(self.layer, observed(seed(turn), turn), self.settings)
            updates += self.teaching.settle(self.settings)
        return updates

    def kinds(self) -> list[StudentEvent]:
        return [event.event for event in self.events]


def test_each_layer_has_first_weights_of_its_own_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        one, other, twin = runtime(), runtime(), Runtime(None, OPTIONS, 1, MODEL)
        weights = [
            owner.layer(name, 2, 8, CPU).student.state_dict()["weight"]
            for owner, name in (
                (one, "single.0"), (one, "single.1"), (other, "single.0"), (twin, "single.0"),
            )
        ]  # fmt: skip
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[3])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not weights[0].is_inference()


def test_training_counts_measures_and_reports() -> None:
    taught = Taught(training_steps=8, updates_per_call=2)
    updates = taught.teach(6)
    assert [update.update for update in updates] == [1, 2, 3, 4, 5, 6, 7, 8]
    measured = [update.update for update in updates if "nmse" in update.metrics]
    assert measured == [3, 6, 8]
    last = updates[-1].metrics
    assert {"attention_kl", "topk_overlap", "cosine", "error_p99", "log_mass_bias"} <= set(last)
    assert all(0 < update.metrics["seconds"] < 60 for update in updates)
    assert updates[-1].metrics["loss_ema"] != updates[-1].metrics["loss"]
    assert last["replay_bytes"] == last["held_bytes"] > 0
    assert taught.kinds() == [StudentEvent.COMPLETE]
    assert taught.runtime.unsaved == 8
    assert all(parameter.grad is None for parameter in taught.layer.student.parameters())


def test_held_out_queries_are_never_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: set[int] = set()
    measured: set[int] = set()
    original = LinearStudent.predict

    def predict(self: LinearStudent, rows: Any, chunk: int) -> Any:
        (trained if torch.is_grad_enabled() else measured).update(rows.index.tolist())
        return original(self, rows, chunk)

    monkeypatch.setattr(LinearStudent, "predict", predict)
    taught = Taught(progress_every=1)
    taught.teach(30)
    again = Taught(taught.runtime, progress_every=1)
    again.teach(10)
    assert len(measured) == 8 and not measured & trained
    # Drawn anew in each call, so that in time all others are taught.
    assert len(trained) == LAYOUT.tokens - 8


def test_training_leaves_generator_and_tensors_alone() -> None:
    taught = Taught(replay_share=0.0)
    call = observed()
    before = [tensor.clone() for tensor in (call.query, call.key, call.value, call.out)]
    state = torch.random.get_rng_state()
    taught.teaching.teach(taught.layer, call, taught.settings)
    for tensor, was in zip((call.query, call.key, call.value, call.out), before, strict=True):
        assert torch.equal(tensor, was) and tensor.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert taught.teaching.replay.total_bytes == 0


def test_earlier_calls_are_returned_to(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[float] = []
    original = LinearStudent.predict

    def predict(self: LinearStudent, rows: Any, chunk: int) -> Any:
        if torch.is_grad_enabled():
            keys.append(float(rows.key[0, 0, 0, 0]))
        return original(self, rows, chunk)

    monkeypatch.setattr(LinearStudent, "predict", predict)
    Taught(replay_share=1.0).teach(12)
    present = [float(observed(turn).key[0, 0, 0, 0]) for turn in range(12)]
    assert keys[0] == present[0]
    halves = {float(torch.tensor(value).bfloat16()) for value in present}
    assert all(value in halves for value in keys[1:])


def test_memory_is_asked_for_with_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnscope.attention import reservation

    monkeypatch.setattr(reservation, "LEAST_BYTES", 1)
    taught = Taught(memory_reserve_factor=2.0)
    taught.teach(3)
    (needed,) = taught.asked
    call = observed()
    working = LinearStudent.training_bytes(taught.layer.student, call.query.shape, 12, 16)
    copies = 4 * 2 * 8 * (4 * LAYOUT.tokens + 4 * 16)
    assert needed == 2 * (copies + max(working, 4 * 2 * LAYOUT.tokens * 16))
    silent = Taught(memory_reserve=False)
    silent.teach(1)
    assert not silent.asked


def lacking(limit: int, what: str = "training") -> Callable[[str, int], None]:
    """Memory for chunks up to a limit only."""

    def allocating(kind: str, chunk: int) -> None:
        if kind == what and chunk > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB")

    return allocating


def test_a_lack_of_memory_halves_the_chunk_for_this_layer_and_this_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []

    def allocating(kind: str, chunk: int) -> None:
        tried.append(chunk)
        lacking(4)(kind, chunk)

    monkeypatch.setattr(LinearStudent, "allocating", staticmethod(allocating))
    taught = Taught(progress_every=100)
    updates = taught.teach(3)
    assert [update.update for update in updates] == [1, 2, 3]
    assert tried == [16, 8, 4, 4, 4]
    assert taught.kinds() == [StudentEvent.OUT_OF_MEMORY] * 2
    assert "16 → 8" in taught.events[0].detail and "6 GiB" in taught.events[0].detail
    other = taught.runtime.layer("single.1", 2, 8, CPU)
    assert taught.teaching.chunk(other.name) == 16
    assert not taught.teaching.off


def test_what_never_fits_turns_training_off_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LinearStudent, "allocating", staticmethod(lacking(0)))
    taught = Taught()
    before = {n: t.clone() for n, t in taught.layer.student.state_dict().items()}
    assert taught.teach(4) == []
    assert taught.kinds() == [StudentEvent.OUT_OF_MEMORY] * 2 + [StudentEvent.TRAINING_OFF]
    assert "no memory for a chunk of 4" in taught.teaching.off
    after = taught.layer.student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert taught.runtime.unsaved == 0


@pytest.mark.parametrize("site", ["rows", "to_host", "log_mass", "output_scores", "lesson"])
def test_memory_may_run_out_anywhere(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnscope.attention.ttr import replay

    owner: Any = {"rows": Observed, "to_host": replay.KeptCall, "lesson": replay.KeptCall}.get(
        site, teaching
    )
    original, failures = getattr(owner, site), iter([True, False, True])

    def scarce(*args: Any, **kwargs: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, site, scarce)
    taught = Taught(progress_every=1)
    updates = taught.teach(4)
    assert [update.update for update in updates] == [1, 2, 3, 4]
    assert set(taught.kinds()) == {StudentEvent.OUT_OF_MEMORY}
    assert not taught.teaching.off


def test_a_teacher_that_is_not_finite_teaches_nothing_and_is_not_returned_to() -> None:
    taught = Taught(replay_share=1.0)
    taught.teach(2)
    before = {n: t.clone() for n, t in taught.layer.student.state_dict().items()}
    bad = observed(50, 2)
    bad.out[:] = torch.nan
    one = Taught(taught.runtime, replay_share=0.0)
    one.teaching.teach(one.layer, bad, one.settings)
    assert one.teaching.settle(one.settings) == []
    assert one.kinds() == [StudentEvent.TEACHER_NOT_FINITE]
    after = one.layer.student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert one.layer.updates == 2
    # Kept, drawn once, then forgotten: the next updates are good again.
    again = Taught(taught.runtime, replay_share=0.9)
    again.teaching.teach(again.layer, bad, again.settings)
    again.teaching.settle(again.settings)
    assert again.teaching.replay.total_bytes == 0
    assert len(again.teach(5)) == 5


def test_errors_are_told_and_three_in_a_row_turn_training_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(kind: str, chunk: int) -> None:
        raise ValueError("the student broke")

    monkeypatch.setattr(LinearStudent, "allocating", staticmethod(broken))
    taught = Taught()
    assert taught.teach(5) == []
    assert taught.kinds() == [StudentEvent.UPDATE_FAILED] * 3 + [StudentEvent.TRAINING_OFF]


def test_an_interrupt_in_an_update_passes_and_leaves_the_student_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taught = Taught(updates_per_call=3)
    taught.teach(1)
    before = {n: t.clone() for n, t in taught.layer.student.state_dict().items()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LinearStudent, "allocating", staticmethod(interrupt))
        taught.teaching.teach(taught.layer, observed(9), taught.settings)
    after = taught.layer.student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [update.update for update in taught.teach(1)] == [4, 5, 6]


def test_a_checkpoint_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first = Taught(runtime(path), replay_share=0.0)
    first.teach(4)
    first.runtime.save()
    resumed = runtime(path)
    with torch.inference_mode():
        assert resumed.load(frozenset({"single.0", "double.0"}), named=True)
    again = Taught(resumed, replay_share=0.0)
    layer, loaded = first.layer, again.layer
    assert (loaded.updates, loaded.loss, loaded.nmse) == (layer.updates, layer.loss, layer.nmse)
    straight = Taught(first.runtime, replay_share=0.0)
    assert [u.metrics["loss"] for u in straight.teach(3)] == [
        u.metrics["loss"] for u in again.teach(3)
    ]


def test_checkpoints_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    taught = Taught(runtime(path))
    taught.teach(1)
    taught.runtime.save()
    with pytest.raises(CheckpointError, match=r"single\.0, which the model doesn't have"):
        runtime(path).load(frozenset({"double.0"}), named=True)
    loaded = runtime(path)
    loaded.load(frozenset(), named=True)
    with pytest.raises(CheckpointError, match="has 2 heads of 8; allowed: 4 of 8"):
        loaded.layer("single.0", 4, 8, CPU)
    assert runtime(tmp_path / "none.safetensors").load(frozenset(), named=True) is False


def test_readiness_follows_the_threshold_with_hysteresis() -> None:
    taught = Taught()
    taught.teach(6)
    nmse = taught.layer.nmse.value
    assert nmse is not None
    assert taught.runtime.judge(Rule(nmse * 1.01, 1.5, 100)) == []
    assert taught.runtime.judge(Rule(nmse * 1.01, 1.5, 6)) == [taught.layer]
    assert taught.runtime.judge(Rule(nmse * 0.7, 1.5, 6)) == []
    assert taught.runtime.judge(Rule(nmse * 0.5, 1.5, 6)) == [taught.layer]
    assert taught.runtime.ready == 0


def load(one: Runtime) -> bool:
    return one.load(frozenset(), named=True)


def test_the_pool_hands_out_once_and_recovers_what_it_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    store = Pool()
    taken = store.take(path, OPTIONS, 0, MODEL, load)
    assert not (taken.loaded or taken.recovered or taken.shared)
    Taught(taken.runtime).teach(2)
    busy = store.take(path, OPTIONS, 0, MODEL, load)
    assert busy.shared and busy.runtime is not taken.runtime
    other = store.take(path, OPTIONS, 0, ModelPrint("flux", "other"), lambda one: False)
    assert not other.shared
    taken.runtime.save()
    taken.runtime.release()
    store.give_back(taken.runtime)
    kept = store.take(path, OPTIONS, 0, MODEL, load)
    assert kept.runtime is taken.runtime and not kept.loaded
    monkeypatch.setattr(pool, "KEPT_BYTES", 1)
    store.give_back(kept.runtime)
    gone = weakref.ref(kept.runtime)
    del kept, taken
    gc.collect()
    assert gone() is None
    back = store.take(path, OPTIONS, 0, MODEL, load)
    assert back.loaded and back.recovered and back.runtime.updates == 2


def test_what_could_not_be_written_is_kept_and_what_changed_on_disk_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    store = Pool()
    monkeypatch.setattr(pool, "KEPT_BYTES", 1)
    taken = store.take(path, OPTIONS, 0, MODEL, load)
    Taught(taken.runtime).teach(1)
    store.give_back(taken.runtime)
    kept = store.take(path, OPTIONS, 0, MODEL, load)
    assert kept.runtime is taken.runtime and kept.runtime.unsaved == 1
    kept.runtime.save()
    monkeypatch.setattr(pool, "KEPT_BYTES", 2**30)
    store.give_back(kept.runtime)
    elsewhere = Taught(runtime(path))
    load(elsewhere.runtime)
    elsewhere.teach(5)
    elsewhere.runtime.save()
    read = store.take(path, OPTIONS, 0, MODEL, load)
    assert read.loaded and read.runtime.updates == 6


def test_a_checkpoint_that_cannot_be_used_leaves_the_pool_usable(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"damaged")
    store = Pool()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="can't be read"):
            store.take(path, OPTIONS, 0, MODEL, load)
    path.unlink()
    assert not store.take(path, OPTIONS, 0, MODEL, load).shared
