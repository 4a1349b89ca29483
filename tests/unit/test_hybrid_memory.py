"""The hybrid's memory estimate against what is held, and the room that is asked for by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.held_bytes import HeldBytes
from support.hybrid_reference import form

from attnscope.attention import reservation
from attnscope.attention.hybrid import near
from attnscope.attention.hybrid.attend import hybrid_attention
from attnscope.attention.hybrid.basis import Basis, Key, fit, identity
from attnscope.attention.hybrid.memory import Shape, working_bytes
from attnscope.attention.hybrid.variant import HybridVariant
from attnscope.attention.settings import HybridSettings
from attnscope.attention.taylor.shaping import NormRule
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.variant import Call, RunInfo

CPU = torch.device("cpu")


def ratio(shape: Shape, dtype: torch.dtype, fits: bool, **changes: Any) -> float:
    """The estimate over the peak of what operators allocate and something refers to."""
    given: dict[str, Any] = {"prefix": 64, "window": 128, "chunk": 64, "rank": 16}
    f = form(**(given | changes))
    generator = torch.Generator().manual_seed(0)

    def made(width: int) -> torch.Tensor:
        size = (shape.batch, shape.heads, shape.tokens, width)
        return torch.randn(size, generator=generator).to(dtype)

    query, key, *pre = (made(shape.head_dim) for _ in range(4))
    value = made(shape.value_dim)

    def find(query: Any, keys: Any, mean: Any, narrow: torch.dtype) -> Basis:
        which = Key("x", shape.heads, shape.head_dim, f.rank, narrow, CPU)
        return fit(which, query, keys, mean, 512) if fits else identity(which)

    def run() -> None:
        hybrid_attention(query, key, value, 0.1, (pre[0], pre[1]), f, find)

    # Tables of monomials and samples are kept from call to call.
    run()
    with HeldBytes() as held:
        run()
    return working_bytes(shape, dtype, f, CPU, fits=fits) / held.peak


@pytest.mark.parametrize("combine", ["joint", "additive"])
@pytest.mark.parametrize(
    ("shape", "dtype", "fits", "changes"),
    [
        (Shape(1, 4, 1024, 64, 64), torch.float32, True, {}),
        (Shape(1, 4, 1024, 64, 64), torch.bfloat16, True, {}),
        (Shape(1, 4, 1024, 64, 64), torch.bfloat16, False, {"wide": False}),
        (Shape(1, 2, 512, 32, 32), torch.float64, False, {}),
        (Shape(1, 24, 1024, 64, 64), torch.float32, True, {}),
        (Shape(3, 2, 512, 64, 64), torch.float32, True, {"prefix": 0}),
        (Shape(1, 4, 512, 64, 64), torch.float32, True, {"terms": 5, "rank": 12}),
        (Shape(1, 4, 512, 64, 64), torch.float32, False, {"terms": 1}),
        (Shape(1, 2, 1024, 64, 64), torch.float32, True, {"window": 300, "chunk": 256}),
        (Shape(1, 2, 1024, 64, 64), torch.float32, True, {"prefix": 600}),
        (Shape(1, 2, 1024, 64, 64), torch.bfloat16, True, {"window": 900, "weight": 0.0}),
        (Shape(1, 2, 1024, 64, 32), torch.float32, True, {}),
        (Shape(1, 4, 1024, 64, 64), torch.float32, True, {"norm": NormRule(0.5, 2.0)}),
        (Shape(1, 24, 256, 128, 128), torch.float32, True, {"prefix": 16}),
    ],
)
def test_the_estimate_is_what_is_held(
    shape: Shape, dtype: torch.dtype, fits: bool, changes: dict[str, Any], combine: str
) -> None:
    assert ratio(shape, dtype, fits, combine=combine, **changes) == pytest.approx(1.0, abs=0.15)


def test_the_estimate_is_what_is_held_without_fused_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(near, "_operator", lambda *about: None)
    for bound in (2**18, 2**28):
        monkeypatch.setattr(near, "_LOGITS_BYTES", bound)
        for dtype in (torch.float32, torch.bfloat16):
            found = ratio(Shape(1, 2, 1024, 32, 32), dtype, True)
            assert found == pytest.approx(1.0, abs=0.15)


def test_room_is_asked_for_once_a_shape_and_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation, "LEAST_BYTES", 1)
    asked: list[int] = []
    variant = HybridVariant()
    variant.prepare(RunInfo(sigmas=(1.0, 0.0), reserve=lambda size, device: asked.append(size)))
    tensors = torch.randn(5, 1, 2, 126, 16)

    def attend(sigma: float = 0.5, **changes: Any) -> None:
        given = {"min_tokens": 0, "local_window": 16, "local_chunk": 16} | changes
        call = Call(
            HybridSettings(**given), None, sigma, 0, 0.25,
            layout=TokenLayout(6, ((10, 12),)), pre_rope=(tensors[3], tensors[4]),
        )  # fmt: skip
        variant.attend(*tensors[:3], call)

    ramp = {"global_sigma_low": 0.2, "global_sigma_high": 0.8}
    attend(**ramp)
    attend(sigma=0.3, **ramp)
    attend(local_window=24, memory_reserve=False)
    assert len(asked) == 1
    attend(local_window=24, memory_reserve_factor=2.0)
    attend(global_weight=0.0)
    first, wider, local = asked
    assert wider == pytest.approx(first / 1.1 * 2.0, rel=1e-4)
    assert local < first
