"""An update: it learns, in float32, under ComfyUI's inference mode, whole or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.linear_student import LinearStudent

from attnscope.attention.exact import reference_attention
from attnscope.attention.ttr.loss import LossOptions
from attnscope.attention.ttr.student import Prediction, Rows, StudentOptions, Target
from attnscope.attention.ttr.trainer import Rates, Trainer, training

CPU = torch.device("cpu")
RATES = Rates(learning_rate=1e-2, share_learning_rate=1e-2, gradient_clip=1.0)
LOSS = LossOptions(huber_beta=0.05, cosine_weight=1.0, far_weight=0.1)


def student(seed: int = 0) -> LinearStudent:
    options = StudentOptions("residual", 2, 8, 16, 1, 0)
    return LinearStudent(options, torch.Generator().manual_seed(seed))


def lesson(seed: int = 0, tokens: int = 40, queries: int = 12) -> tuple[Rows, Target]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, tokens, 8, generator=generator).unbind(0)
    out = reference_attention(q, k, v, 0.35).float()
    mass = torch.logsumexp(q @ k.transpose(-2, -1) * 0.35, dim=-1)
    index = torch.randperm(tokens, generator=generator)[:queries]
    rows = Rows(q[:, :, index], index, k, v, 0.35, None)
    return rows, Target(out[:, :, index], mass[:, :, index])


def state(one: LinearStudent, trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = {**one.state_dict(), **trainer.state()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


def test_updates_lower_the_loss_under_inference_mode_and_autocast() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with training(CPU):
            one = student()
            trainer = Trainer(one)
        losses = []
        for _ in range(60):
            with training(CPU):
                made = trainer.update(*lesson(), RATES, LOSS, 64)
            losses.append(float(made.loss))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 and not p.is_inference() for p in one.parameters())
    assert all(p.grad is None for p in one.parameters())


def test_rates_are_those_of_each_update() -> None:
    one = student()
    trainer = Trainer(one)
    before = state(one, trainer)
    trainer.update(*lesson(), Rates(1e-9, 1e-1, 1.0), LOSS, 64)
    assert (one.share.detach() - before["share"]).abs().max() > 0.05
    assert (one.weight.detach() - before["weight"]).abs().max() < 1e-8
    moved = one.share.detach().clone()
    trainer.update(*lesson(), Rates(1e-1, 1e-9, 1.0), LOSS, 64)
    assert (one.weight.detach() - before["weight"]).abs().max() > 0.05
    assert (one.share.detach() - moved).abs().max() < 1e-8


def test_the_gradient_is_told_as_it_was_and_applied_clipped() -> None:
    one = student()
    trainer = Trainer(one)
    made = trainer.update(*lesson(), Rates(1e-3, 1e-3, 1e-6), LOSS, 64)
    assert float(made.gradient_norm) > 1e-3
    first = trainer.state()["weight/exp_avg"]
    assert 0 < float(first.norm()) < 1e-6


@pytest.mark.parametrize("broken", ["target", "key"])
def test_what_is_not_finite_changes_nothing(broken: str) -> None:
    one = student()
    trainer = Trainer(one)
    trainer.update(*lesson(), RATES, LOSS, 64)
    before = state(one, trainer)
    rows, target = lesson(1)
    if broken == "target":
        target.out[0, 0, 0, 0] = torch.nan
    else:
        rows.key[0, 0, 0, 0] = torch.inf
    made = trainer.update(rows, target, RATES, LOSS, 64)
    assert not made.finite
    assert bool(made.teacher_finite) == (broken == "key")
    after = state(one, trainer)
    for name in before:
        if not name.endswith("/step"):
            assert torch.equal(before[name], after[name]), name
    assert trainer.update(*lesson(2), RATES, LOSS, 64).finite


def test_the_first_update_of_all_may_be_the_one_that_is_not_finite() -> None:
    one = student()
    trainer = Trainer(one)
    weights = one.weight.detach().clone()
    rows, target = lesson()
    target.out.fill_(torch.inf)
    assert not trainer.update(rows, target, RATES, LOSS, 64).finite
    assert torch.equal(one.weight.detach(), weights)
    assert not trainer.state()["weight/exp_avg"].any()


@pytest.mark.parametrize("where", ["forward", "backward", "step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_is_raised_within_leaves_all_as_it_was(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = student()
    trainer = Trainer(one)
    for turn in range(2):
        trainer.update(*lesson(turn), RATES, LOSS, 64)
    before = state(one, trainer)

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(LinearStudent, "allocating", staticmethod(fail))
        elif where == "backward":
            patch.setattr(torch.Tensor, "backward", fail)
        else:
            original = torch.optim.AdamW.step

            def half(self: Any, *_: Any) -> None:
                original(self)
                raise error

            patch.setattr(torch.optim.AdamW, "step", half)
        with pytest.raises(error):
            trainer.update(*lesson(5), RATES, LOSS, 64)
    assert same(before, state(one, trainer))
    other = student()
    twin = Trainer(other)
    for turn in (0, 1, 3):
        twin.update(*lesson(turn), RATES, LOSS, 64)
    trainer.update(*lesson(3), RATES, LOSS, 64)
    assert same(state(other, twin), state(one, trainer))


def test_training_goes_on_from_a_state_as_if_it_had_never_stopped() -> None:
    one = student()
    trainer = Trainer(one)
    for turn in range(3):
        trainer.update(*lesson(turn), RATES, LOSS, 64)
    other = student(7)
    twin = Trainer(other)
    other.load_state_dict(one.state_dict())
    twin.load_state({name: tensor.clone() for name, tensor in trainer.state().items()})
    for turn in range(3, 5):
        trainer.update(*lesson(turn), RATES, LOSS, 64)
        twin.update(*lesson(turn), RATES, LOSS, 64)
    assert same(state(one, trainer), state(other, twin))


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"other/exp_avg": torch.zeros(1)}, "other/exp_avg"),
        ({"weight/velocity": torch.zeros(2, 8, 16)}, "weight/velocity"),
        ({"weight/exp_avg": torch.zeros(3)}, "shape"),
        ({"weight/exp_avg": torch.zeros(2, 8, 16)}, "only exp_avg"),
    ],
)
def test_a_state_of_another_student_is_refused(
    state: dict[str, torch.Tensor], complaint: str
) -> None:
    trainer = Trainer(student())
    with pytest.raises(ValueError, match=complaint):
        trainer.load_state(state)
    assert not trainer.state()


def test_predictions_stay_differentiable_with_tensors_of_the_inference_mode() -> None:
    with torch.inference_mode():
        rows, target = lesson()
    with torch.inference_mode(), training(CPU):
        one = student()
        with pytest.raises(RuntimeError, match=r"[Ii]nference"):
            Trainer(one).update(rows, target, RATES, LOSS, 64)
        clones = Rows(
            rows.query.clone(), rows.index, rows.key.clone(), rows.value.clone(), 0.35, None
        )
        prediction: Prediction = one.predict(clones, 64)
        assert prediction.out.requires_grad
