"""Tiled attention as a variant: what keeps it from a call, what it asks for, what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.held_bytes import HeldBytes
from torch.utils._python_dispatch import TorchDispatchMode

from attnscope.attention import reservation
from attnscope.attention.exact import reference_attention
from attnscope.attention.reasons import Fallback, Gate
from attnscope.attention.settings import TiledSettings
from attnscope.attention.tiled.attend import tiled_attention
from attnscope.attention.tiled.memory import working_bytes
from attnscope.attention.tiled.variant import TiledVariant, options_of
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.variant import Call, LayerId, RunInfo, exact_flops

LAYOUT = TokenLayout(8, ((16, 24),))
SCALE = 16**-0.5


def tensors(layout: TokenLayout = LAYOUT, keys: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (layout.tokens, keys or layout.tokens, keys or layout.tokens)
    return [torch.randn(1, 2, length, 16, generator=generator) for length in lengths]


def call(layout: TokenLayout | None = LAYOUT, **given: Any) -> Call:
    place = {
        "layer": LayerId("double", 3), "sigma": 0.5, "step": 9, "mask": None,
        "log_mass_rows": None,
    }  # fmt: skip
    for name in place:
        place[name] = given.pop(name, place[name])
    return Call(TiledSettings(**{"min_tokens": 0, **given}), scale=SCALE, layout=layout, **place)


@pytest.mark.parametrize(
    ("given", "gate"),
    [
        ({}, None),
        ({"enabled": False}, Gate.DISABLED),
        ({"min_tokens": 393}, Gate.BELOW_MIN_TOKENS),
        ({"dense_first_steps": 10}, Gate.DENSE_STEP),
        ({"dense_first_steps": 9}, None),
        ({"tiled_sigma_max": 0.4}, Gate.SIGMA_ABOVE_MAX),
        ({"tiled_sigma_max": 0.5}, None),
        ({"tiled_sigma_max": 0.5, "sigma": None}, Gate.SIGMA_UNKNOWN),
        ({"tiled_block_type": "single"}, Gate.BLOCK_TYPE),
        ({"tiled_layer_start": 4}, Gate.LAYER_OUTSIDE_RANGE),
        ({"tiled_layer_end": 3}, None),
        ({"tiled_layer_end": 3, "layer": None}, Gate.LAYER_UNKNOWN),
    ],
)
def test_gates(given: dict[str, Any], gate: Gate | None) -> None:
    query, key, _ = tensors()
    assert TiledVariant().gate(query, key, call(**given)) is gate


@pytest.mark.parametrize(("device", "least"), [("cpu", 4096), ("meta", 8192)])
def test_the_least_tokens_go_by_the_device(device: str, least: int) -> None:
    for tokens, gate in ((least - 1, Gate.BELOW_MIN_TOKENS), (least, None)):
        query = torch.empty(1, 1, tokens, 16, device=device)
        assert TiledVariant().gate(query, query, call(min_tokens=-1)) is gate
        assert TiledVariant().gate(query, query, call(min_tokens=tokens)) is None


def test_cross_attention_is_left_to_exact_attention() -> None:
    query, key, _ = tensors(keys=77)
    assert TiledVariant().gate(query, key, call()) is Gate.CROSS_ATTENTION


@pytest.mark.parametrize(
    ("layout", "mask", "reason", "named"),
    [
        (None, None, Fallback.LAYOUT, "does not say where"),
        (TokenLayout(9, ((16, 24),)), None, Fallback.LAYOUT, "the layout has 393 tokens"),
        (TokenLayout(392, ()), None, Fallback.LAYOUT, "no image tokens"),
        (LAYOUT, torch.ones(1, 1, 1, 392, dtype=torch.bool), Fallback.MASK, "without a mask"),
        (LAYOUT, torch.zeros(1, 1, 392, 392), Fallback.MASK, "without a mask"),
    ],
)
def test_what_can_not_be_tiled_runs_exact_with_a_reason(
    layout: TokenLayout | None, mask: torch.Tensor | None, reason: Fallback, named: str
) -> None:
    result = TiledVariant().attend(*tensors(), call(layout, mask=mask))
    assert result.out is None
    assert result.fallback is reason
    assert named in result.detail


def test_settings_reach_the_approximation() -> None:
    query, key, value = tensors()
    exact = reference_attention(query, key, value, SCALE)
    outs = []
    for given in (
        {}, {"window_radius": 0}, {"window_radius": 0, "top_k": 1},
        {"window_radius": 0, "far_order": 0}, {"window_radius": 0, "centroid_size": "16"},
        {"window_radius": 0, "variance_correction": False},
    ):  # fmt: skip
        out = TiledVariant().attend(query, key, value, call(**given)).out
        assert out is not None and out.dtype == query.dtype
        assert all(not torch.equal(out, other) for other in outs)
        outs.append(out)
    # 2 × 3 tiles lie in one window of radius 1.
    torch.testing.assert_close(outs[0].double(), exact, rtol=1e-4, atol=1e-5)


def test_log_mass_comes_only_of_the_rows_that_are_wanted() -> None:
    query, key, value = tensors()
    assert TiledVariant().attend(query, key, value, call()).log_mass is None
    rows = torch.tensor([0, 7, 200])
    mass = TiledVariant().attend(query, key, value, call(log_mass_rows=rows)).log_mass
    exact = (query[:, :, rows] @ key.transpose(-2, -1) * SCALE).logsumexp(dim=-1)
    assert mass is not None and mass.dtype == torch.float32
    torch.testing.assert_close(mass, exact, rtol=1e-4, atol=1e-4)


def test_room_is_asked_for_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation, "LEAST_BYTES", 1)
    asked: list[int] = []
    variant = TiledVariant()
    variant.prepare(RunInfo(sigmas=(1.0, 0.0), reserve=lambda size, device: asked.append(size)))
    for _ in range(2):
        variant.attend(*tensors(), call(memory_reserve_factor=2.0))
    variant.attend(*tensors(), call(window_radius=0, memory_reserve=False))
    sizes = (1, 2, 16, 16, torch.float32, LAYOUT)
    bytes_ = working_bytes(*sizes, options_of(TiledSettings()), torch.device("cpu"))
    assert asked == [2 * bytes_]


@pytest.mark.parametrize(
    "given",
    [{}, {"centroid_size": "16"}, {"top_k": 4}, {"far_order": 0}, {"window_radius": 0}],
)
def test_the_memory_estimate_covers_what_is_allocated(given: dict[str, Any]) -> None:
    layout = TokenLayout(32, ((64, 64),))
    options = options_of(TiledSettings(**given))
    query, key, value = (torch.randn(1, 2, layout.tokens, 32) for _ in range(3))
    # What the tiles are cut into is kept from call to call.
    tiled_attention(query, key, value, SCALE, layout, options)
    with HeldBytes() as held:
        tiled_attention(query, key, value, SCALE, layout, options)
    estimate = working_bytes(1, 2, 32, 32, torch.float32, layout, options, torch.device("cpu"))
    assert held.peak <= estimate <= 2 * held.peak


class Products(TorchDispatchMode):
    """Counts the operations of products of matrices, those into given memory included."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm_", "baddbmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        elif name.startswith("_scaled_dot_product"):
            query, key, value = args[:3]
            pairs = query.shape[:-1].numel() * key.shape[2]
            self.flops += 2 * pairs * (key.shape[3] + value.shape[3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "given", [{}, {"centroid_size": "16"}, {"top_k": 3}, {"far_order": 0}, {"window_radius": 0}]
)
def test_flops_are_those_of_the_products(given: dict[str, Any]) -> None:
    layout = TokenLayout(64, ((48, 64),))
    shape = (1, 1, layout.tokens, 32)
    query, key, value = (torch.randn(shape) for _ in range(3))
    chosen = TiledSettings(min_tokens=0, variance_correction=False, **given)
    with Products() as counted:
        TiledVariant().attend(query, key, value, Call(chosen, None, None, 9, SCALE, layout=layout))
    stated = TiledVariant.flops(shape, shape, chosen, layout)
    assert math.isclose(counted.flops, stated, rel_tol=0.05)
    assert stated < exact_flops(shape, shape)


def test_flops_need_a_layout() -> None:
    with pytest.raises(ValueError, match="layout: is None; allowed: a layout"):
        TiledVariant.flops((1, 1, 64, 16), (1, 1, 64, 16), TiledSettings())
