"""The default settings on diffusion-like heads: safe, better than the first backend's, bounded."""

from __future__ import annotations

import pytest
import torch

from attnscope.attention.evaluation import Case, Configuration, evaluate
from attnscope.attention.settings import TaylorSettings
from attnscope.attention.structured import structured_qkv
from attnscope.attention.taylor.attend import Options
from attnscope.attention.taylor.features import feature_dim
from attnscope.attention.taylor.memory import Shape, working_bytes
from attnscope.attention.taylor.variant import TaylorVariant
from attnscope.attention.variant import Call, exact_flops

DEFAULT = TaylorSettings()
ORIGIN = TaylorSettings(
    P=4,
    sub_head_blocks=4,
    sub_head_mode="independent",
    feature_projection=0,
    centre_queries=False,
    centre_keys=False,
    centre_values=False,
    fallback_on_negative=False,
)


def case(kind: str, std: float) -> Case:
    made = structured_qkv(kind, std, rows=16, columns=16, text_tokens=64, seed=3)  # type: ignore[arg-type]
    return Case(kind, kind, 0, None, made.query, made.key, made.value, made.scale)


@pytest.mark.parametrize("kind", ["content", "positional"])
@pytest.mark.parametrize("std", [1.0, 2.0, 3.0])
def test_nearer_to_exact_than_independent_blocks(kind: str, std: float) -> None:
    configurations = [
        Configuration("default", "taylor", DEFAULT),
        Configuration("origin", "taylor", ORIGIN),
    ]
    mine, origin = evaluate(case(kind, std), configurations, queries=0, pairs=0)
    assert mine.reason == "" and mine.nmse is not None and origin.nmse is not None
    assert mine.nmse < origin.nmse
    assert mine.nmse < 0.1 or std > 1.0


@pytest.mark.parametrize("std", [1.0, 4.0, 12.0])
def test_denominators_are_positive_however_sharp_the_logits(std: float) -> None:
    sharp = case("positional", std)
    call = Call(DEFAULT, None, None, 0, sharp.scale)
    result = TaylorVariant().attend(sharp.query, sharp.key, sharp.value, call)
    assert result.fallback is None and result.out is not None
    assert result.out.isfinite().all()
    # The least value of 1 + x + x²/2 is a half, and a denominator is a mean of such values.
    assert float(result.stats["denom_min"]) > 0.49


@pytest.mark.parametrize("tokens", [4_608, 16_896, 66_048])
def test_work_and_memory_stay_bounded_at_diffusion_scale(tokens: int) -> None:
    shape = Shape(1, 24, tokens, tokens, 128, 128)
    options = Options(feature_projection=DEFAULT.feature_projection)
    assert feature_dim(options.feature_width(128), DEFAULT.P) == 561
    sizes = (1, 24, tokens, 128)
    assert TaylorVariant.flops(sizes, sizes, DEFAULT) < 0.15 * exact_flops(sizes, sizes)

    def needed(shape: Shape) -> int:
        device = torch.device("cpu")
        return working_bytes("torch", shape, torch.bfloat16, DEFAULT.P, options, device)

    # What comes on top of the output doesn't grow with heads, nor faster than the tokens.
    output = 24 * tokens * (128 * 2 + 4)
    assert needed(shape) - output < 2**30
    assert needed(shape._replace(queries=2 * tokens, keys=2 * tokens)) < 2.2 * needed(shape)


def test_heads_of_32_or_less_keep_all_their_coordinates() -> None:
    options = Options(feature_projection=DEFAULT.feature_projection)
    assert [options.feature_width(dim) for dim in (16, 32, 64, 128)] == [16, 32, 32, 32]
