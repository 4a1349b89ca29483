"""The sums from logits against those from features, and where each is the cheaper."""

from __future__ import annotations

import pytest
import torch

from attnscope.attention.settings import TaylorSettings
from attnscope.attention.taylor import autotune, direct, kernel, probe
from attnscope.attention.taylor.attend import Options
from attnscope.attention.variant import Call, LayerId


@pytest.mark.parametrize("terms", range(1, 9))
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_logits_and_features_give_the_same_sums(
    terms: int, constant: bool, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(terms)
    query, key, value = (
        torch.randn(2, 3, tokens, width, generator=generator, dtype=torch.float64)
        for tokens, width in ((5, 4), (9, 4), (9, 7))
    )
    weights = torch.rand(2, 1, 9, generator=generator, dtype=torch.float64) if weighted else None
    found, wanted = (
        sums(query, key, value, terms, weights=weights, constant=constant)
        for sums in (direct.sums, kernel.sums)
    )
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_blocks_of_queries_change_nothing() -> None:
    query, key, value = torch.randn(3, 1, 2, 50, 8, dtype=torch.float64).unbind(0)
    whole = direct.sums(query, key, value, 4)
    for left, right in zip(direct.sums(query, key, value, 4, block_q=7), whole, strict=True):
        torch.testing.assert_close(left, right)


def test_half_precision_is_summed_in_float32() -> None:
    query, key, value = torch.randn(3, 1, 2, 30, 8).bfloat16().unbind(0)
    numerator, denominator = direct.sums(query, key, value, 3)
    assert numerator.dtype == denominator.dtype == torch.float32
    wanted, _ = kernel.sums(query.double(), key.double(), value.double(), 3)
    torch.testing.assert_close(numerator.double(), wanted, rtol=1e-4, atol=1e-4)


def test_few_queries_go_by_logits_and_many_by_features() -> None:
    assert direct.is_cheaper(16, 16_896, 32, 0, 3)
    assert direct.is_cheaper(512, 512, 128, 128, 3)
    assert not direct.is_cheaper(16_896, 16_896, 32, 32, 3)
    assert not direct.is_cheaper(1024, 1024, 8, 8, 2)


def test_the_probe_and_the_tuner_go_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def features(*args: object, **kwargs: object) -> None:
        made.append(1)
        raise AssertionError("features were made")

    monkeypatch.setattr(kernel, "sums", features)
    query, key = torch.randn(2, 1, 2, 300, 16).unbind(0)
    denominators = probe.probe_denominators(query, key, 0.25, 4, 16, options=Options())
    assert denominators.shape == (1, 2, 16, 1)
    with pytest.raises(AssertionError, match="features were made"):
        probe.probe_denominators(query, key, 0.25, 2, 300, options=Options())

    settings = TaylorSettings(P=4, auto_tune=True, auto_tune_candidates=2)
    call = Call(settings, LayerId("single", 0), 0.5, 0, 0.25)
    tuner = autotune.Tuner()
    tuner.watch(query, key, key, call, Options(), None, features)  # type: ignore[arg-type]
    tuner.settle(settings)
    many = settings.model_copy(update={"P": 2, "auto_tune_max_tokens": 300})
    with pytest.raises(AssertionError, match="features were made"):
        autotune.Tuner().watch(
            query, key, key, Call(many, None, 0.5, 0, 0.25), Options(), None,
            features,  # type: ignore[arg-type]
        )  # fmt: skip
