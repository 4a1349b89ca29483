"""Held-out scores and the teacher's mass, against direct computations."""

from __future__ import annotations

import pytest
import torch
from support.ttr_calls import SCALE, call_of

from attnscope.attention.distillation import TRAINING_METRIC_NAMES
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr import teacher
from attnscope.attention.ttr.scores import exact_weights, output_scores, weight_scores
from attnscope.attention.ttr.student import Prediction, Target


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, 3, 11, 5, generator=generator)
    return exact * 1.1 + 0.05 * torch.randn(exact.shape, generator=generator), exact


def test_scores_of_outputs() -> None:
    out, exact = tensors()
    mass = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))
    scores = output_scores(Prediction(out, mass + 0.25), Target(exact, mass))
    error = (out - exact).double()
    relative = (error.abs().flatten() / exact.double().square().mean().sqrt()).sort().values
    count = len(relative)
    expected = {
        "nmse": error.square().sum() / exact.double().square().sum(),
        "cosine": torch.cosine_similarity(out, exact, dim=-1).mean(),
        "norm_ratio": out.norm() / exact.norm(),
        "mean_ratio": out.abs().mean() / exact.abs().mean(),
        "std_ratio": out.std() / exact.std(),
        "error_p95": relative[-(-count * 95 // 100) - 1],
        "error_p99": relative[-(-count * 99 // 100) - 1],
        "log_mass_bias": 0.25,
    }
    assert set(scores) == set(expected)
    for name, value in expected.items():
        assert float(scores[name]) == pytest.approx(float(value), rel=1e-4), name
        assert scores[name].ndim == 0


def test_no_mass_no_bias() -> None:
    out, exact = tensors()
    assert "log_mass_bias" not in output_scores(Prediction(out), Target(exact, exact[..., 0]))


def test_scores_of_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(1, 2, 5, 40, generator=generator).pow(4)
    exact = exact / exact.sum(-1, keepdim=True)
    made = (exact + 0.02 * torch.rand(exact.shape, generator=generator)).roll(1, dims=-1)
    made = made / made.sum(-1, keepdim=True)
    scores = weight_scores(made, exact)
    kl = (exact * (exact.log() - made.log())).sum(-1).mean()
    assert float(scores["attention_kl"]) == pytest.approx(float(kl), rel=1e-4)
    shared = [
        len(set(a.topk(16).indices.tolist()) & set(b.topk(16).indices.tolist())) / 16
        for a, b in zip(exact.flatten(0, 2), made.flatten(0, 2), strict=True)
    ]
    assert float(scores["topk_overlap"]) == pytest.approx(sum(shared) / len(shared), rel=1e-5)
    same = weight_scores(exact, exact)
    assert float(same["attention_kl"]) == pytest.approx(0.0, abs=1e-6)
    assert float(same["topk_overlap"]) == 1.0


def test_weights_of_few_keys() -> None:
    exact = torch.full((1, 1, 2, 3), 1 / 3)
    assert float(weight_scores(exact, exact)["topk_overlap"]) == 1.0


def test_no_weight_is_no_infinity() -> None:
    exact = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    made = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    assert bool(weight_scores(made, exact)["attention_kl"].isfinite())


def test_every_score_is_a_metric() -> None:
    out, exact = tensors()
    names = set(output_scores(Prediction(out, exact[..., 0]), Target(exact, exact[..., 0])))
    names |= set(weight_scores(exact.softmax(-1), exact.softmax(-1)))
    assert names <= set(TRAINING_METRIC_NAMES)


@pytest.mark.parametrize("chunk", [1, 4096, 2**30])
def test_teacher_s_mass_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(teacher, "_CHUNK_BYTES", chunk)
    call = call_of(TokenLayout(3, ((9, 9),)), batch=2)
    rows = call.query[:, :, ::5]
    found = teacher.log_mass(rows, call.key, SCALE)
    expected = (rows.double() @ call.key.double().transpose(-2, -1) * SCALE).logsumexp(-1)
    torch.testing.assert_close(found, expected.float())


def test_exact_weights_are_softmax() -> None:
    call = call_of(TokenLayout(3, ((9, 9),)))
    weights = exact_weights(call.query[:, :, :4].bfloat16(), call.key.bfloat16(), SCALE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 4))
    mass = teacher.log_mass(call.query[:, :, :4].bfloat16(), call.key.bfloat16(), SCALE)
    logits = call.query[:, :, :4].bfloat16().float() @ call.key.bfloat16().float().mT * SCALE
    torch.testing.assert_close(weights, (logits - mass.unsqueeze(-1)).exp())
