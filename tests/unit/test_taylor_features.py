"""Monomial features against the multinomial theorem, spelled out naively."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations_with_replacement

import pytest
import torch

from attnscope.attention.taylor.features import (
    degree_dim,
    feature_dim,
    multiplicity_weights,
    next_degree,
    product_weights,
)
from attnscope.attention.taylor.plan import make_plan, stages


def monomials(x: torch.Tensor, degree: int) -> torch.Tensor:
    features = x.new_ones(*x.shape[:-1], 1)
    for current in range(1, degree + 1):
        features = next_degree(x.mT, features.mT, current).mT
    return features


@pytest.mark.parametrize("head_dim", [1, 2, 5])
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_features_are_the_unique_monomials_in_lexicographic_order(
    head_dim: int, degree: int
) -> None:
    x = torch.randn(3, head_dim, dtype=torch.float64)
    multisets = list(combinations_with_replacement(range(head_dim), degree))
    expected = torch.stack(
        [
            torch.stack([x[:, i] for i in m]).prod(0) if m else torch.ones(3).double()
            for m in multisets
        ],
        dim=-1,
    )
    assert degree_dim(head_dim, degree) == len(multisets)
    torch.testing.assert_close(monomials(x, degree), expected)


@pytest.mark.parametrize("head_dim", [1, 3, 4])
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 5])
def test_weights_are_one_over_the_factorials_of_the_exponents(head_dim: int, degree: int) -> None:
    expected = [
        1.0 / math.prod(math.factorial(n) for n in Counter(m).values())
        for m in combinations_with_replacement(range(head_dim), degree)
    ]
    torch.testing.assert_close(
        multiplicity_weights(head_dim, degree), torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize(("head_dim", "value_dim", "terms"), [
    (4, 5, 1), (4, 5, 8), (5, 0, 4), (32, 32, 4), (12, 3, 5), (56, 128, 5), (128, 128, 3),
])  # fmt: skip
def test_a_plan_holds_every_feature_once(head_dim: int, value_dim: int, terms: int) -> None:
    plan = make_plan(head_dim, value_dim, terms)
    total = feature_dim(head_dim, terms)
    assert sum(chunk.features for chunk in plan.chunks) == total
    for limit in (1, total // 3, total):
        parts = stages(plan, limit)
        assert [chunk for part in parts for chunk in part] == list(plan.chunks)
        assert all(len(p) == 1 or sum(c.features for c in p) <= limit for p in parts)


@pytest.mark.parametrize(("lead", "tail"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_weights_of_products_are_those_of_the_whole_monomials(lead: int, tail: int) -> None:
    head_dim, last = 5, 2
    heads = [m for m in _colexicographic(head_dim, lead) if m[-1] == last]
    tails = [m for m in combinations_with_replacement(range(head_dim), tail) if m[0] >= last]
    expected = [
        [1.0 / math.prod(math.factorial(n) for n in Counter(a + b).values()) for b in tails]
        for a in heads
    ]

    def weights(leads: slice) -> torch.Tensor:
        return product_weights(
            head_dim, lead, tail, last, leads, torch.device("cpu"), torch.float64
        )

    whole = weights(slice(0, len(heads)))
    torch.testing.assert_close(whole, torch.tensor(expected, dtype=torch.float64))
    for row in range(len(heads)):
        torch.testing.assert_close(weights(slice(row, row + 1)), whole[row : row + 1])


def _colexicographic(head_dim: int, degree: int) -> list[tuple[int, ...]]:
    monomials = combinations_with_replacement(range(head_dim), degree)
    return sorted(monomials, key=lambda monomial: monomial[::-1])


def test_feature_dim_counts_all_degrees_below_p() -> None:
    assert feature_dim(128, 3) == 8385
    assert feature_dim(128, 4) == 366_145
    assert feature_dim(7, 5) == sum(degree_dim(7, degree) for degree in range(5))


@pytest.mark.parametrize("degree", range(7))
def test_weighted_dot_product_of_features_is_a_power_over_a_factorial(degree: int) -> None:
    q, k = torch.randn(2, 6, 4, dtype=torch.float64)
    weighted = monomials(q, degree) * multiplicity_weights(4, degree)
    torch.testing.assert_close(
        (weighted * monomials(k, degree)).sum(-1),
        (q * k).sum(-1) ** degree / math.factorial(degree),
    )
