"""Flux2TTR as a variant: its gates, what it wants to be shown, what it says without students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.linear_student import LinearStudent

from attnscope.attention import evaluation
from attnscope.attention.distillation import Occurrence, StudentEvent, Update
from attnscope.attention.exact import reference_attention
from attnscope.attention.reasons import Fallback, Gate
from attnscope.attention.settings import TtrSettings
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr import build, pool, variant
from attnscope.attention.variant import Call, LayerId, ModelPrint, RunInfo

LAYOUT = TokenLayout(4, ((4, 9),))
LAYER = LayerId("single", 3)
SMALL: dict[str, Any] = {
    "features": 16, "query_samples": 16, "batch_queries": 12, "heldout_queries": 8,
    "progress_every": 2, "ready_min_updates": 2, "ready_threshold": 1.0,
}  # fmt: skip


class Heard:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.events: list[Occurrence] = []

    def updated(self, updates: Any, replay_limit_bytes: int) -> None:
        self.updates += updates

    def happened(self, occurrence: Occurrence) -> None:
        self.events.append(occurrence)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.STUDENTS, "residual", LinearStudent)
    monkeypatch.setattr(LinearStudent, "allocating", staticmethod(lambda what, chunk: None))
    monkeypatch.setattr(variant, "POOL", pool.Pool())


@pytest.fixture
def heard() -> Heard:
    return Heard()


def begun(folder: Path | None, heard: Heard, **settings: Any) -> tuple[Any, TtrSettings]:
    own = TtrSettings(**{**SMALL, **settings})
    one = variant.TtrVariant()
    model = ModelPrint("flux", "abc")
    one.prepare(RunInfo((1.0, 0.0), settings=own, model=model, folder=folder, listener=heard))
    return one, own


def tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, 2, LAYOUT.tokens, 8, generator=generator).unbind(0)


def call(settings: TtrSettings, **fields: Any) -> Call:
    values: dict[str, Any] = {
        "settings": settings, "layer": LAYER, "sigma": 0.5, "step": 0, "scale": 0.35,
        "layout": LAYOUT,
    }  # fmt: skip
    return Call(**{**values, **fields})


def learn(one: Any, settings: TtrSettings, calls: int) -> None:
    for turn in range(calls):
        with torch.inference_mode():
            q, k, v = tensors(turn)
            about = call(settings, step=turn)
            assert one.gate(q, k, about) is Gate.DISTILLING
            assert one.wants(q, k, about)
            one.observe(q, k, v, reference_attention(q, k, v, 0.35).float(), about)
            one.retune(settings)


@pytest.mark.parametrize(
    ("settings", "fields", "gate"),
    [
        ({"enabled": False}, {}, Gate.DISABLED),
        ({"min_tokens": 41}, {}, Gate.BELOW_MIN_TOKENS),
        ({"ttr_sigma_max": 0.4}, {}, Gate.SIGMA_ABOVE_MAX),
        ({"ttr_block_type": "double"}, {}, Gate.BLOCK_TYPE),
        ({"ttr_layer_start": 4}, {}, Gate.LAYER_OUTSIDE_RANGE),
        ({"ttr_layer_end": 2}, {}, Gate.LAYER_OUTSIDE_RANGE),
        ({}, {"layer": None}, Gate.LAYER_UNKNOWN),
        ({}, {}, Gate.DISTILLING),
        ({"mode": "serve"}, {}, Gate.NOT_READY),
    ],
)
def test_gates(tmp_path: Path, heard: Heard, settings: Any, fields: Any, gate: Gate) -> None:
    one, own = begun(tmp_path, heard, **settings)
    q, k, _ = tensors()
    about = call(own, **fields)
    assert one.gate(q, k, about) is gate
    assert one.wants(q, k, about) == (gate is Gate.DISTILLING)
    assert one.gate(q[:, :, :9], k, call(own)) in (Gate.CROSS_ATTENTION, Gate.DISABLED, gate)


@pytest.mark.parametrize("fields", [{"mask": torch.ones(1, 1, 1, 40).bool()}, {"layout": None}])
def test_what_no_student_can_take_is_told_and_not_taught(
    tmp_path: Path, heard: Heard, fields: dict[str, Any]
) -> None:
    one, own = begun(tmp_path, heard)
    q, k, v = tensors()
    about = call(own, **fields)
    assert one.gate(q, k, about) is None and not one.wants(q, k, about)
    reason = Fallback.MASK if "mask" in fields else Fallback.LAYOUT
    assert one.attend(q, k, v, about).fallback is reason


def test_it_learns_becomes_ready_and_serves_in_the_inputs_dtype(
    tmp_path: Path, heard: Heard
) -> None:
    one, own = begun(tmp_path, heard)
    learn(one, own, 4)
    one.finish()
    assert [update.update for update in heard.updates] == [1, 2, 3, 4]
    assert [event.event for event in heard.events] == [
        StudentEvent.READY, StudentEvent.CHECKPOINT_SAVED,
    ]  # fmt: skip
    again, serving = begun(tmp_path, heard, mode="serve")
    q, k, v = (tensor.bfloat16() for tensor in tensors())
    about = call(serving, log_mass_rows=torch.tensor([1, 5]))
    with torch.inference_mode():
        assert again.gate(q, k, about) is None and not again.wants(q, k, about)
        result = again.attend(q, k, v, about)
    assert result.out is not None and result.out.dtype == torch.bfloat16
    assert result.log_mass is not None and result.log_mass.shape == (1, 2, 2)
    # A threshold that is lowered while it runs takes the readiness away.
    strict = serving.model_copy(update={"ready_threshold": 1e-6})
    again.retune(strict)
    assert again.gate(q, k, call(strict)) is Gate.NOT_READY
    assert heard.events[-1].event is StudentEvent.NOT_READY


def test_pausing_completing_and_serving_ask_for_no_teacher(tmp_path: Path, heard: Heard) -> None:
    one, own = begun(tmp_path, heard, training_steps=3)
    q, k, _ = tensors()
    paused = own.model_copy(update={"training_paused": True})
    assert not one.wants(q, k, call(paused))
    learn(one, own, 3)
    assert not one.wants(q, k, call(own))
    assert heard.events[-1].event is StudentEvent.COMPLETE
    more = own.model_copy(update={"training_steps": 4})
    assert one.wants(q, k, call(more))
    one.finish()


def test_the_checkpoint_is_written_on_demand_and_after_so_many_updates(
    tmp_path: Path, heard: Heard
) -> None:
    one, own = begun(tmp_path, heard, checkpoint="mine", checkpoint_now=3)
    saved = tmp_path / "mine.safetensors"
    learn(one, own, 1)
    assert not saved.exists()
    one.retune(own.model_copy(update={"checkpoint_now": 4}))
    first = saved.stat().st_mtime_ns
    one.retune(own.model_copy(update={"checkpoint_now": 4}))
    assert saved.stat().st_mtime_ns == first
    every = own.model_copy(update={"checkpoint_now": 4, "checkpoint_every": 2})
    learn(one, every, 2)
    kinds = [event.event for event in heard.events]
    assert kinds.count(StudentEvent.CHECKPOINT_SAVED) == 2
    one.finish()
    assert [e.event for e in heard.events].count(StudentEvent.CHECKPOINT_SAVED) == 2


def test_a_run_beside_another_on_the_same_students_does_not_train_them(
    tmp_path: Path, heard: Heard
) -> None:
    one, own = begun(tmp_path, heard)
    beside = Heard()
    other, _ = begun(tmp_path, beside)
    q, k, _ = tensors()
    assert one.wants(q, k, call(own)) and not other.wants(q, k, call(own))
    assert beside.events[-1].event is StudentEvent.TRAINING_OFF
    other.finish()
    learn(one, own, 1)
    one.finish()
    third, _ = begun(tmp_path, heard)
    assert third.wants(q, k, call(own))


def test_evaluation_without_a_checkpoint_refuses_with_the_reason(
    tmp_path: Path, heard: Heard
) -> None:
    q, k, v = tensors()
    case = evaluation.Case("one", "single.3", 0, 0.5, q, k, v, 0.35, layout=LAYOUT)

    def measured(**settings: Any) -> evaluation.Outcome:
        own = TtrSettings(**{**SMALL, **settings})
        (outcome,) = evaluation.evaluate(
            case, [evaluation.Configuration("ttr", "ttr", own)], pairs=1
        )
        return outcome

    assert "no checkpoint is named" in measured().reason
    missing = measured(mode="serve", checkpoint=str(tmp_path / "none"))
    assert missing.reason.startswith("not_ready")
    one, own = begun(tmp_path, heard)
    learn(one, own, 4)
    one.finish()
    (path,) = tmp_path.iterdir()
    found = measured(mode="serve", checkpoint=str(path))
    assert found.reason == "" and found.nmse is not None and found.nmse < 1.0
    assert found.flops is not None and measured(mode="serve", checkpoint=str(path)).nmse
