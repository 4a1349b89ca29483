"""The loss of an update: what is zero, what is weighed, what stays finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from attnscope.attention.ttr.loss import LossOptions, loss
from attnscope.attention.ttr.student import Prediction, Target

OPTIONS = LossOptions(huber_beta=0.05, cosine_weight=1.0, far_weight=0.1)


def parts(*, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Near and far outputs ``[1, 2, 7, 4]`` and log masses ``[1, 2, 7]``."""
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(2, 1, 2, 7, 4, generator=generator, dtype=torch.float64).to(dtype)
    masses = torch.randn(2, 1, 2, 7, generator=generator, dtype=torch.float64).to(dtype) + 20.0
    return outs[0], outs[1], masses[0], masses[1]


def joined(
    near: torch.Tensor, far: torch.Tensor, near_mass: torch.Tensor, far_mass: torch.Tensor
) -> Prediction:
    mass = torch.logaddexp(near_mass, far_mass)
    out = near * (near_mass - mass).exp().unsqueeze(-1) + far * (far_mass - mass).exp().unsqueeze(
        -1
    )
    return Prediction(out, mass, far, far_mass, near, near_mass)


def target_of(prediction: Prediction) -> Target:
    assert prediction.log_mass is not None
    return Target(prediction.out, prediction.log_mass)


def test_the_teacher_itself_has_no_loss() -> None:
    made = joined(*parts())
    found = loss(made, target_of(made), OPTIONS)
    assert found.far is not None
    for value in (found.total, found.huber, found.cosine, found.far):
        assert float(value) == pytest.approx(0.0, abs=1e-12)


def test_output_terms_are_huber_and_cosine() -> None:
    generator = torch.Generator().manual_seed(1)
    out, exact = torch.randn(2, 1, 2, 7, 4, generator=generator, dtype=torch.float64)
    found = loss(Prediction(out), Target(exact, exact[..., 0]), LossOptions(0.3, 2.0, 5.0))
    error = ((out - exact) / exact.square().mean().sqrt()).abs()
    huber = torch.where(error < 0.3, error.square() / 2, 0.3 * (error - 0.15)).mean() / 0.3
    cosine = 1 - cosine_similarity(out, exact, dim=-1).mean()
    assert found.far is None
    torch.testing.assert_close(found.huber, huber)
    torch.testing.assert_close(found.cosine, cosine)
    torch.testing.assert_close(found.total, huber + 2 * cosine)


def test_outputs_are_compared_relative_to_the_teacher() -> None:
    made = joined(*parts())
    target = target_of(joined(parts()[1], *parts()[1:]))
    once = loss(made, target, OPTIONS)
    scaled = [x * 1000 for x in (made.out, made.far_out, made.near_out) if x is not None]
    larger = Prediction(
        scaled[0], made.log_mass, scaled[1], made.far_log_mass, scaled[2], made.near_log_mass
    )
    again = loss(larger, Target(target.out * 1000, target.log_mass), OPTIONS)
    torch.testing.assert_close(once.total, again.total)


def test_far_term_is_weighed_by_the_teacher_s_far_share() -> None:
    near, far, near_mass, far_mass = parts()
    target = target_of(joined(near, far, near_mass, far_mass))
    made = joined(near, far, near_mass, far_mass + 0.2)
    share = (far_mass - target.log_mass).exp()
    found = loss(made, target, OPTIONS).far
    assert found is not None
    torch.testing.assert_close(found, (share * 0.02).mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_a_far_part_teach_nothing_about_it(dtype: torch.dtype) -> None:
    near, far, near_mass, far_mass = parts(dtype=dtype)
    none = torch.zeros_like(far_mass, dtype=torch.bool)
    none[:, :, ::2] = True
    exact = joined(near, far, near_mass, far_mass.masked_fill(none, -math.inf))
    far_mass = far_mass.clone().requires_grad_()
    learnt = far.clone().requires_grad_()
    made = joined(near, learnt, near_mass, (far_mass + 0.3).masked_fill(none, -math.inf))
    found = loss(made, target_of(exact), OPTIONS)
    assert bool(found.total.isfinite())
    found.total.backward()
    assert far_mass.grad is not None and learnt.grad is not None
    assert bool(far_mass.grad.isfinite().all()) and bool(learnt.grad.isfinite().all())
    assert bool((far_mass.grad[none] == 0).all()) and bool((far_mass.grad[~none] != 0).all())


def test_a_teacher_whose_mass_rounds_below_the_near_one_stays_finite() -> None:
    near, far, near_mass, _ = parts(dtype=torch.float32)
    made = joined(near, far.requires_grad_(), near_mass, near_mass - 30.0)
    target = Target(made.out.detach(), near_mass - 1e-3)
    found = loss(made, target, OPTIONS)
    assert found.far is not None and float(found.far.detach()) == 0.0
    assert bool(found.total.isfinite())
    found.total.backward()


def test_silence_of_the_teacher_stays_finite() -> None:
    near, far, near_mass, far_mass = parts(dtype=torch.float32)
    made = joined(near, far, near_mass, far_mass)
    assert made.log_mass is not None
    found = loss(made, Target(torch.zeros_like(made.out), made.log_mass), OPTIONS)
    assert bool(found.total.isfinite())
