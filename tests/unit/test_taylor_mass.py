"""The log mass against its definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnscope.attention.settings import TaylorSettings
from attnscope.attention.taylor import kernel
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.variant import Call

ROWS = torch.arange(0, 96, 7)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """With means that matter."""
    generator = torch.Generator().manual_seed(4)
    some = torch.randn(3, 2, 3, 96, 16, generator=generator, dtype=torch.float64) + 1.0
    return tuple(tensor.to(dtype) for tensor in some.unbind(0))


def masks(kind: str) -> torch.Tensor | None:
    live = torch.arange(96)[None, None, None] < torch.tensor([50, 90])[:, None, None, None]
    if kind == "none":
        return None
    bias = torch.linspace(-2.0, 3.0, 96).expand(2, 1, 1, 96)
    return live if kind == "boolean" else bias.masked_fill(~live, float("-inf"))


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    queries: bool,
    keys: bool,
) -> torch.Tensor:
    """What one term, exp(x) ≈ 1, leaves: log Σⱼ exp(scale·(q̄·(kⱼ - k̄) + q·k̄) + maskⱼ)."""
    q, k = q.double(), k.double()
    bias = torch.zeros(2, 1, 1, 96, dtype=torch.float64)
    if mask is not None:
        bias = mask.double().log() if mask.dtype == torch.bool else mask.double()
    shares = torch.softmax(bias, -1) if mask is not None else torch.full_like(bias, 1 / 96)
    q_mean = q.mean(2, keepdim=True) * queries
    k_mean = (shares @ k) * keys
    exponent = q_mean @ (k - k_mean).transpose(-2, -1) + q @ k_mean.transpose(-2, -1)
    return (exponent * scale + bias).logsumexp(-1).index_select(2, ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("scale", [0.25, -0.25])
def test_the_log_mass_is_what_the_series_leaves_of_the_softmax(
    dtype: torch.dtype, mask: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(dtype)
    # Heads come one at a time and have to find their places.
    monkeypatch.setattr(kernel, "head_groups", one_at_a_time)
    for queries, keys in itertools.product((True, False), repeat=2):
        settings = TaylorSettings(
            P=1, centre_queries=queries, centre_keys=keys, fallback_on_negative=False
        )
        about = Call(settings, None, 0.5, 0, scale, masks(mask), log_mass_rows=ROWS)
        found = TaylorVariant().attend(q, k, v, about).log_mass
        expected = by_definition(q, k, scale, masks(mask), queries, keys)
        assert found is not None and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def one_at_a_time(batch: int, heads: int, *_: int) -> list[tuple[slice, slice]]:
    return [
        (slice(row, row + 1), slice(head, head + 1))
        for row, head in itertools.product(range(batch), range(heads))
    ]
