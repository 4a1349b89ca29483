"""Metrics against their definitions, in float64 over all queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnscope.attention import metrics, quality
from attnscope.attention.exact import reference_attention
from attnscope.attention.variant import Effective

SCALE = 0.25


def tensors(tokens: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return tuple(
        torch.randn(3, 2, 2, tokens, 16, generator=generator, dtype=torch.float64).unbind(0)
    )


def test_all_queries_sampled_give_the_full_metrics() -> None:
    q, k, v = tensors()
    exact = reference_attention(q, k, v, SCALE)
    out = exact + 0.1 * torch.randn_like(exact)
    stats = quality.sampled_stats(q, k, v, out, SCALE, None, 64, 0)
    logits = q @ k.transpose(-2, -1) * SCALE
    expected = {
        "nmse": (out - exact).square().sum() / exact.square().sum(),
        "cosine": torch.nn.functional.cosine_similarity(out, exact, dim=-1).mean(),
        "qk_std": (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt(),
        "qk_p01": torch.quantile(logits.flatten()[::2], 0.01),
        "qk_p50": torch.quantile(logits.flatten()[::2], 0.5),
        "qk_p99": torch.quantile(logits.flatten()[::2], 0.99),
        "q_norm": q.norm(dim=-1).mean(),
        "k_norm": k.norm(dim=-1).mean(),
    }
    expected["nmse_eff"], expected["cosine_eff"] = expected["nmse"], expected["cosine"]
    assert set(stats) == set(expected) <= set(metrics.METRIC_NAMES)
    for name, value in expected.items():
        assert float(stats[name]) == pytest.approx(float(value), rel=1e-4, abs=2e-2), name


def test_few_samples_come_near_the_full_nmse() -> None:
    q, k, v = tensors(512)
    exact = reference_attention(q, k, v, SCALE)
    out = exact + 0.1 * torch.randn(exact.shape, dtype=exact.dtype)
    full = quality.nmse(out, exact)
    sampled = quality.sampled_stats(q, k, v, out, SCALE, None, 32, 0)["nmse"]
    assert float(sampled) == pytest.approx(float(full), rel=0.25)


def test_exact_output_leaves_out_what_it_can_not_have() -> None:
    q, k, v = tensors()
    stats = quality.sampled_stats(q, k, v, None, SCALE, None, 8, 0)
    assert "nmse" not in stats and "qk_std" in stats


@pytest.mark.parametrize("rows", [False, True])
def test_masked_pairs_count_neither_in_quality_nor_in_statistics(rows: bool) -> None:
    q, k, v = tensors()
    mask = (torch.arange(64) < 20)[None, None, None, :]
    exact = reference_attention(q, k, v, SCALE, mask)
    k = k.clone()
    k[:, :, 20:] *= 1000
    if rows:
        mask = mask.expand(1, 1, 64, 64).contiguous()
    stats = quality.sampled_stats(q, k, v, exact, SCALE, mask, 16, 0)
    assert float(stats["nmse"]) < 1e-10
    assert float(stats["qk_p99"]) < 20


def test_nan_in_the_output_shows_in_the_metric() -> None:
    q, k, v = tensors()
    out = reference_attention(q, k, v, SCALE)
    out[0, 0] = float("nan")
    assert torch.isnan(quality.sampled_stats(q, k, v, out, SCALE, None, 16, 0)["nmse"])


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


def test_effective_quality_is_against_the_attention_that_was_approximated() -> None:
    q, k, v = tensors()
    soft = Effective(q * 0.5, k, SCALE * 0.7)
    out = reference_attention(soft.query, soft.key, v, soft.scale)
    mass = (soft.query @ k.transpose(-2, -1) * soft.scale).logsumexp(-1)
    stats = quality.sampled_stats(
        q, k, v, out, SCALE, None, 16, 0, effective=soft, log_mass=mass + 0.25
    )
    assert float(stats["nmse_eff"]) < 1e-10 < 1e-4 < float(stats["nmse"])
    assert float(stats["cosine_eff"]) > 1 - 1e-6 > float(stats["cosine"])
    assert float(stats["log_mass_bias"]) == pytest.approx(0.25, abs=1e-5)


def test_without_shaping_effective_quality_costs_nothing() -> None:
    q, k, v = tensors()
    stats = quality.sampled_stats(q, k, v, v, SCALE, None, 16, 0)
    assert stats["nmse_eff"] is stats["nmse"] and stats["cosine_eff"] is stats["cosine"]


def test_raw_and_effective_quality_look_at_the_same_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = tensors()
    asked: list[torch.Tensor] = []

    def exact_rows(query: torch.Tensor, *rest: Any) -> Any:
        asked.append(query)
        return original(query, *rest)

    original = quality.exact_rows
    monkeypatch.setattr(quality, "exact_rows", exact_rows)
    quality.sampled_stats(q, k, v, v, SCALE, None, 5, 3, effective=Effective(q, k, SCALE / 2))
    raw, effective = asked
    torch.testing.assert_close(raw, effective)
    assert raw.shape[2] == 5
