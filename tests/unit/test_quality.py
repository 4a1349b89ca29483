"""Sampling, exact attention of samples, and the order of metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnscope.attention import metrics, quality

SCALE = 0.25


def tensors(tokens: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return tuple(
        torch.randn(3, 2, 2, tokens, 16, generator=generator, dtype=torch.float64).unbind(0)
    )


def test_heads_taken_a_few_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    whole, whole_mass = quality.exact_rows(q, k, v, SCALE, None)
    monkeypatch.setattr(quality, "_CHUNK_BYTES", 1)
    parts, mass = quality.exact_rows(q, k, v, SCALE, None)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(mass, whole_mass)


def test_samples_spread_over_the_whole_sequence_and_repeat() -> None:
    rows = quality.sampled_indices(1000, 10, 7, torch.device("cpu"))
    assert [int(row) // 100 for row in rows] == list(range(10))
    assert rows.equal(quality.sampled_indices(1000, 10, 7, torch.device("cpu")))
    assert not rows.equal(quality.sampled_indices(1000, 10, 8, torch.device("cpu")))
    assert quality.sampled_indices(3, 10, 0, torch.device("cpu")).tolist() == [0, 1, 2]


def test_worst_layer_follows_the_metrics_direction_and_nan_is_worst() -> None:
    nmse, cosine = metrics.BY_NAME["nmse"], metrics.BY_NAME["cosine"]
    assert metrics.worst(nmse, [0.1, None, 0.3]) == (2, 0.3)
    assert metrics.worst(cosine, [0.9, 0.8]) == (1, 0.8)
    found = metrics.worst(nmse, [0.1, float("nan"), float("inf")])
    assert found is not None and found[0] == 1
    assert metrics.worst(nmse, [None]) is None
    assert metrics.worst(metrics.BY_NAME["q_norm"], [1.0]) is None
    assert metrics.median([None, 3.0, float("nan"), 1.0]) == 2.0
    assert metrics.median([None]) is None


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_exact_rows_are_attention_and_its_logsumexp(factor: float) -> None:
    q, k, v = tensors()
    mask = torch.where(torch.arange(64) < 50, 0.0, float("-inf"))[None, None, None]
    out, mass = quality.exact_rows(q * factor, k, v, SCALE, mask)
    logits = (q * factor @ k.transpose(-2, -1) * SCALE + mask).double()
    torch.testing.assert_close(out.double(), torch.softmax(logits, -1) @ v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mass.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-4)


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """As on CUDA: products of bfloat16 without copies, accumulated in float32."""
    seen: list[torch.dtype] = []
    multiply = torch.bmm

    def bmm(a: torch.Tensor, b: torch.Tensor, out_dtype: Any = None) -> torch.Tensor:
        if out_dtype is None:
            return multiply(a, b)
        assert a.dtype == b.dtype == torch.bfloat16
        seen.append(a.dtype)
        return multiply(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(quality, "accumulates", lambda _, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "bmm", bmm)
    return seen


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_rounded_weights_cost_no_more_than_a_rounded_output(
    factor: float, bfloat16_products: list[torch.dtype]
) -> None:
    q, k, v = (t.to(torch.bfloat16) for t in tensors(512))
    q *= factor
    out, mass = quality.exact_rows(q[:, :, :16], k, v, SCALE, None)
    logits = q[:, :, :16].double() @ k.double().transpose(-2, -1) * SCALE
    exact = torch.softmax(logits, -1) @ v.double()
    assert len(bfloat16_products) == 2 and out.dtype == torch.float32
    assert float(quality.nmse(out, exact)) < 5e-6
    assert float(quality.nmse(exact.to(torch.bfloat16), exact)) < 5e-6
    torch.testing.assert_close(mass.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
