"""The override, called by ComfyUI's own attention functions: layouts, masks, fallbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch

from attnscope.attention.exact import reference_attention
from attnscope.attention.reasons import Gate
from attnscope.attention.settings import TaylorSettings, VariantSettings
from attnscope.attention.tiled.variant import TiledVariant
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.variant import Call, Result, RunInfo, Variant
from attnscope.comfy_plugin.clocks import HostClock
from attnscope.comfy_plugin.recorder import CallRecord
from attnscope.comfy_plugin.run import Run
from attnscope.comfy_plugin.steps import StepTracker

pytestmark = pytest.mark.comfyui

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 7, 11, 8


class Probe(Variant):
    """Attends exactly, by itself, so that whatever the hook gets wrong shows."""

    name: ClassVar[str] = "taylor"
    settings_model: ClassVar[type[VariantSettings]] = TaylorSettings

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.closed: Gate | None = None
        self.act: Callable[[torch.Tensor], Result] = Result

    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        return self.closed

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        self.calls.append(call)
        out = reference_attention(query, key, value, call.scale, call.mask)
        return self.act(out.to(query.dtype))

    @classmethod
    def flops(cls, query_shape: Any, key_shape: Any, settings: VariantSettings) -> float:
        return 0.0


class Bench:
    """A hook with its run, and the records that it makes."""

    def __init__(
        self, earlier: Any = None, variant: Variant | None = None, **settings: Any
    ) -> None:
        from attnscope.comfy_plugin.hooks import AttentionHook

        self.probe = Probe()
        self.records: list[CallRecord] = []
        self.run = Run(
            variant=variant or self.probe,
            settings=(variant or self.probe).settings_model(**settings),
            tracker=StepTracker([1.0, 0.5, 0.0], "sample_euler"),
            clock=HostClock(),
            info=RunInfo(sigmas=[1.0, 0.5, 0.0]),
            put=lambda draft: None,
            interrupt=lambda run: None,
        )
        keep = self.run.record

        def record(call: CallRecord) -> None:
            self.records.append(call)
            keep(call)

        self.run.record = record  # type: ignore[method-assign]
        self.hook = AttentionHook(self.run, earlier)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "optimized_attention_override": self.hook,
            "block_type": "single",
            "block_index": 4,
        }

    @property
    def last(self) -> CallRecord:
        return self.records[-1]


@pytest.fixture
def attention(comfyui: Any) -> Iterator[Any]:
    """ComfyUI's module of attention functions."""
    import comfy.ldm.modules.attention as module

    with torch.inference_mode():
        yield module


def tensors(split: bool = True, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for tokens in (QUERIES, KEYS, KEYS):
        tensor = torch.randn(BATCH, HEADS, tokens, WIDTH, generator=generator).to(dtype)
        if not split:
            tensor = tensor.transpose(1, 2).reshape(BATCH, tokens, HEADS * WIDTH)
        made.append(tensor)
    return made


def _random_mask(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _keep(*shape: int) -> torch.Tensor:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(6)) < 0.6
    keep[..., 0] = True
    return keep


MASKS = {
    "none": None,
    "additive 2": _random_mask(QUERIES, KEYS),
    "additive one row": _random_mask(1, KEYS),
    "additive 3": _random_mask(BATCH, QUERIES, KEYS),
    "additive 3 shared": _random_mask(1, QUERIES, KEYS),
    "additive 4": _random_mask(BATCH, HEADS, QUERIES, KEYS),
    "padding 4": _random_mask(BATCH, 1, 1, KEYS),
    "boolean 2": _keep(QUERIES, KEYS),
    "boolean 3": _keep(BATCH, QUERIES, KEYS),
    "boolean padding 4": _keep(BATCH, 1, 1, KEYS),
}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_every_layout_and_mask_reaches_the_variant_and_comes_back(
    split: bool, keep: bool, mask: str, attention: Any
) -> None:
    bench = Bench()
    query, key, value = tensors(split)
    call = {
        "mask": MASKS[mask],
        "skip_reshape": split,
        "skip_output_reshape": keep,
    }
    expected = attention.attention_pytorch(query, key, value, HEADS, **call)
    out = attention.attention_pytorch(
        query, key, value, HEADS, **call, transformer_options=bench.options
    )
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert bench.last.made_by_variant
    assert (bench.last.tokens_q, bench.last.tokens_k) == (QUERIES, KEYS)
    assert bench.last.layer == "single.4"
    bench.run.end("completed")
    assert {"nmse", "cosine", "qk_std"} <= set(bench.last.stats)


def test_padding_per_picture_in_two_dimensions(attention: Any) -> None:
    bench = Bench()
    query, key, value = tensors()
    mask = _keep(BATCH, KEYS)
    expected = attention.attention_basic(query, key, value, HEADS, mask=mask, skip_reshape=True)
    out = attention.attention_basic(
        query, key, value, HEADS, mask=mask, skip_reshape=True, transformer_options=bench.options
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert bench.last.made_by_variant


def test_positional_arguments(attention: Any) -> None:
    bench = Bench()
    query, key, value = tensors()
    mask = MASKS["additive 2"]
    expected = attention.attention_pytorch(query, key, value, HEADS, mask, None, True)
    out = attention.attention_pytorch(
        query, key, value, HEADS, mask, None, True, transformer_options=bench.options
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert bench.probe.calls[0].mask is not None


def test_scale_is_honoured(attention: Any) -> None:
    bench = Bench()
    query, key, value = tensors()
    out = attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, skip_output_reshape=True, scale=0.05,
        transformer_options=bench.options,
    )  # fmt: skip
    expected = reference_attention(query, key, value, 0.05).float()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options
    )
    assert bench.probe.calls[-1].scale == pytest.approx(WIDTH**-0.5)


@pytest.mark.parametrize(
    ("extra", "known"),
    [
        ({"low_precision_attention": False}, True),
        ({"attn_precision": torch.float32}, True),
        ({"enable_gqa": False}, True),
        ({"enable_gqa": True}, False),
        ({"window": 3}, False),
    ],
)
def test_arguments_that_are_not_understood_run_exactly(
    extra: dict[str, Any], known: bool, attention: Any
) -> None:
    bench = Bench()
    query, key, value = tensors()
    plain = attention.attention_pytorch(query, key, value, HEADS, skip_reshape=True)
    out = attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options, **extra
    )
    assert bench.last.made_by_variant is known
    if not known:
        assert torch.equal(out, plain)
        assert (bench.last.kind, bench.last.reason) == ("fallback", "unknown_argument")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (lambda q, k, v: ((q, k[:, :1], v), {"skip_reshape": True}), "layout"),
        (lambda q, k, v: ((q[0], k[0], v[0]), {"skip_reshape": True}), "layout"),
        (lambda q, k, v: ((q, k, v), {"skip_reshape": True, "mask": torch.ones(5, 5)}), "mask"),
    ],
)
def test_what_can_not_be_read_runs_exactly_with_its_reason(
    args: Any, reason: str, attention: Any
) -> None:
    bench = Bench()
    positional, named = args(*tensors())
    answer = object()
    out = bench.hook(lambda *a, **k: answer, *positional, HEADS, **named)
    assert out is answer
    assert (bench.last.kind, bench.last.reason) == ("fallback", reason)


def test_an_earlier_override_is_the_exact_path(attention: Any) -> None:
    seen: list[Any] = []

    def earlier(func: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["skip_reshape"])
        return func(*args, **kwargs) * 2

    query, key, value = tensors()
    plain = attention.attention_pytorch(query, key, value, HEADS, skip_reshape=True)
    bench = Bench(earlier)
    bench.probe.closed = Gate.DISABLED
    out = attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options
    )
    assert torch.equal(out, plain * 2)
    assert seen == [True]
    assert (bench.last.kind, bench.last.reason) == ("gate", "disabled")
    bench.probe.closed = None
    attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options
    )
    assert seen == [True]


@pytest.mark.parametrize("knows", [True, False])
def test_the_dense_part_of_a_call_goes_through_an_earlier_override(
    attention: Any, knows: bool
) -> None:
    """Text queries of the tiled variant, in ComfyUI's own calling convention."""
    text, seen = 2, []

    def earlier(func: Any, q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> Any:
        seen.append((q.shape[2], k.shape[2], kwargs.get("mask")))
        assert kwargs["transformer_options"]["block_index"] == 4
        if not knows:
            kwargs.pop("skip_output_reshape", None)
        return func(q, k, v, heads, **kwargs) * 2

    bench = Bench(earlier, TiledVariant(), min_tokens=0, dense_first_steps=0)
    layout = TokenLayout(text, ((QUERIES - text, 1),))
    bench.run.layouts.read = lambda *sizes: layout  # type: ignore[method-assign]
    query = tensors()[0]
    plain = attention.attention_pytorch(query, query, query, HEADS, skip_reshape=True)
    out = attention.attention_pytorch(
        query, query, query, HEADS, skip_reshape=True, transformer_options=bench.options
    )
    assert bench.last.made_by_variant, bench.last
    assert seen == [(text, QUERIES, None)]
    torch.testing.assert_close(out[:, :text], plain[:, :text] * 2)
    # One tile, which is exact.
    torch.testing.assert_close(out[:, text:], plain[:, text:])


def _raising(error: BaseException) -> Callable[[torch.Tensor], Result]:
    def act(out: torch.Tensor) -> Result:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (_raising(RuntimeError("broken")), "error"),
        (_raising(torch.OutOfMemoryError("full")), "out_of_memory"),
        (lambda out: Result(out[:, :1]), "error"),
    ],
)
def test_our_failures_never_reach_the_sampler(act: Any, reason: str, attention: Any) -> None:
    bench = Bench()
    bench.probe.act = act
    query, key, value = tensors()
    plain = attention.attention_pytorch(query, key, value, HEADS, skip_reshape=True)
    out = attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options
    )
    assert torch.equal(out, plain)
    assert (bench.last.kind, bench.last.reason) == ("fallback", reason)
    assert not bench.last.made_by_variant


def test_a_broken_measurement_changes_nothing(
    attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope.comfy_plugin import hooks

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no statistics today")

    monkeypatch.setattr(hooks, "sample_call", broken)
    bench = Bench()
    query, key, value = tensors()
    out = attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options
    )
    assert out.shape == (BATCH, QUERIES, HEADS * WIDTH)
    assert bench.last.made_by_variant


@pytest.mark.parametrize("error", [ValueError("theirs"), KeyboardInterrupt()])
def test_the_exact_path_s_own_exceptions_pass(error: BaseException, comfyui: Any) -> None:
    def func(*args: Any, **kwargs: Any) -> Any:
        raise error

    bench = Bench()
    bench.probe.closed = Gate.DISABLED
    with pytest.raises(type(error)):
        bench.hook(func, *tensors(), HEADS, skip_reshape=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_monitor_hands_through_the_very_same_output(dtype: Any, attention: Any) -> None:
    from attnscope.attention.exact import ExactVariant

    bench = Bench(variant=ExactVariant())
    query, key, value = tensors(dtype=dtype)
    plain = attention.attention_pytorch(query, key, value, HEADS, skip_reshape=True)
    out = attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options
    )
    assert torch.equal(out, plain)
    assert not bench.last.kind
    bench.run.end("completed")
    assert "qk_std" in bench.last.stats
    assert "nmse" not in bench.last.stats
    attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, window=1, transformer_options=bench.options
    )
    assert not bench.last.kind


def test_quality_is_sampled_only_where_it_is_wanted(attention: Any) -> None:
    query, key, value = tensors()

    def measured(bench: Bench) -> bool:
        attention.attention_pytorch(
            query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options
        )
        # Statistics are made when the step closes.
        bench.run.called_back(bench.run.step)
        bench.run.begin_evaluation()
        return "nmse" in bench.last.stats

    assert not measured(Bench(quality_samples=0))
    bench = Bench(quality_every=2)
    bench.run.begin_evaluation()
    assert measured(bench)
    assert bench.run.step == 1
    assert not measured(bench)


def test_calls_are_timed_without_their_measurements(attention: Any) -> None:
    bench = Bench()
    query, key, value = tensors()
    attention.attention_pytorch(
        query, key, value, HEADS, skip_reshape=True, transformer_options=bench.options
    )
    assert bench.last.end > bench.last.start
