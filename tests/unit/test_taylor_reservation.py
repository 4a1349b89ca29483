"""Room is asked for before a call allocates, once per kind of call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnscope.attention import reservation
from attnscope.attention.settings import TaylorSettings
from attnscope.attention.sums_paths import SumsPath
from attnscope.attention.taylor import kernel
from attnscope.attention.taylor.attend import Options
from attnscope.attention.taylor.dispatch import Choice
from attnscope.attention.taylor.memory import Shape, working_bytes
from attnscope.attention.taylor.triton_stream import StreamConfig
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.variant import Call, RunInfo

SCALE = 16**-0.5
CPU = torch.device("cpu")


class Asked(list[tuple[int, torch.device]]):
    def __call__(self, needed: int, device: torch.device) -> None:
        self.append((needed, device))


def prepared(asked: Asked) -> TaylorVariant:
    variant = TaylorVariant()
    variant.prepare(RunInfo(sigmas=(1.0, 0.0), reserve=asked))
    return variant


def attend(variant: TaylorVariant, tokens: int = 40, **settings: Any) -> None:
    q = torch.zeros(1, 2, tokens, 16)
    variant.attend(q, q, q, Call(TaylorSettings(**settings), None, None, 0, SCALE))


def test_the_estimate_times_the_factor_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation, "LEAST_BYTES", 1)
    asked = Asked()
    variant = prepared(asked)
    for _ in range(3):
        attend(variant, memory_reserve_factor=1.5)
    estimate = working_bytes(
        "torch", Shape(1, 2, 40, 40, 16, 16), torch.float32, 3, Options(), CPU
    )
    assert asked == [(int(1.5 * estimate), CPU)]
    attend(variant, tokens=41)
    attend(variant, P=4)
    assert len(asked) == 3
    attend(prepared(asked))
    assert len(asked) == 4, "a new run asks anew"


def test_what_is_asked_for_is_the_need_of_the_path_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from attnscope.attention.taylor import variant as module

    picked: list[StreamConfig] = []

    def pick(setting: str, stream: StreamConfig, *rest: Any) -> tuple[Choice, Any]:
        picked.append(stream)
        return Choice(SumsPath.STREAMING_TERMS, "P is too high"), kernel.sums

    monkeypatch.setattr(reservation, "LEAST_BYTES", 1)
    monkeypatch.setattr(module, "pick", pick)
    asked = Asked()
    variant = prepared(asked)
    wanted = []
    for size in (64, 4096):
        attend(variant, P=5, fused_feature_chunk_size=size, memory_reserve_factor=1.0)
        stream = StreamConfig(feature_chunk=size)
        assert picked[-1] == stream
        shape = Shape(1, 2, 40, 40, 16, 16)
        wanted.append(
            working_bytes("streaming", shape, torch.float32, 5, Options(), CPU, stream=stream)
        )
    assert [needed for needed, _ in asked] == wanted and wanted[0] < wanted[1]
    assert len(picked) == 2, "the path is chosen once a call"


def test_small_calls_and_those_that_must_not_ask_do_not() -> None:
    asked = Asked()
    attend(prepared(asked))
    assert asked == []


def test_switched_off_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation, "LEAST_BYTES", 1)
    asked = Asked()
    attend(prepared(asked), memory_reserve=False)
    assert asked == []


def test_room_is_asked_for_before_the_call_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnscope.attention.taylor import variant as module

    monkeypatch.setattr(reservation, "LEAST_BYTES", 1)
    order: list[str] = []
    original = module.taylor_attention

    def taylor_attention(*args: Any, **kwargs: Any) -> Any:
        order.append("attention")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "taylor_attention", taylor_attention)
    variant = TaylorVariant()
    variant.prepare(RunInfo(sigmas=(), reserve=lambda needed, device: order.append("room")))
    attend(variant)
    assert order == ["room", "attention"]
