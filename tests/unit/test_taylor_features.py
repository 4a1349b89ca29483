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
)


def monomials(x: torch.Tensor, degree: int) -> torch.Tensor:
    features = x.new_ones(*x.shape[:-1], 1)
    for current in range(1, degree + 1):
        features = next_degree(x, features, current)
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
