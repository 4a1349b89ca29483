"""Tiled attention's kernels in Triton's interpreter. `test_tiled_triton` runs this file.

The reference is the torch path in float64: the same approximation. Bounds are NMSE. fp32: 1e-11,
a few roundings of fp32. bf16 and fp16: 1e-4 and 1e-5, from roundings of 2⁻⁹ and 2⁻¹² in operands
and weights; the first-order terms are bf16 in both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnscope.attention.settings import TiledSettings
from attnscope.attention.tiled.attend import Attended, tiled_attention
from attnscope.attention.tiled.dispatch import choose_for
from attnscope.attention.tiled.options import Options
from attnscope.attention.tiled.triton_attend import tiled_attention_triton
from attnscope.attention.tiled.triton_job import head_runs, make_job
from attnscope.attention.tiled.triton_plan import Config
from attnscope.attention.tiled.triton_pool import pool_tiles
from attnscope.attention.tiled.variant import TiledVariant
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.variant import Call

BOUND = {torch.float32: 1e-11, torch.bfloat16: 1e-4, torch.float16: 1e-5}
ONE, TWO = Config(), Config(together=2, warps=8)
PLAIN = TokenLayout(20, ((24, 32),))
ODD = TokenLayout(64, ((24, 24),))
RAGGED = TokenLayout(70, ((19, 27), (8, 13)))


def tensors(
    layout: TokenLayout, width: int = 32, dtype: torch.dtype = torch.float32, heads: int = 1
) -> list[torch.Tensor]:
    """Smooth along the sequence, so that tiles have means, spreads and first-order terms."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for factor in (1.5, 1.0, 1.0):
        coarse = torch.randn(1, heads * width, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=layout.tokens, mode="linear")
        x = smooth.view(1, heads, width, layout.tokens).transpose(-1, -2)
        noise = torch.randn(x.shape, generator=generator)
        made.append(((x + 0.5 * noise) * factor).to(dtype))
    return made


def nmse(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).square().sum() / wanted.square().sum())


def reference(given: list[torch.Tensor], layout: TokenLayout, options: Options) -> Attended:
    query, key, value = (x.double() for x in given)
    scale = query.shape[-1] ** -0.5
    rows = torch.arange(layout.tokens)
    return tiled_attention(query, key, value, scale, layout, options, log_mass_rows=rows)


def run(given: list[torch.Tensor], layout: TokenLayout, options: Options, **more: Any) -> Attended:
    return tiled_attention_triton(*given, given[0].shape[-1] ** -0.5, layout, options, **more)


CASES = [
    # layout, width, dtype, options, config
    (PLAIN, 64, torch.bfloat16, Options(radius=0), ONE),
    (PLAIN, 128, torch.bfloat16, Options(radius=0), TWO),
    (PLAIN, 32, torch.float32, Options(radius=1), ONE),
    (PLAIN, 32, torch.float16, Options(radius=0), TWO),
    (ODD, 32, torch.float32, Options(radius=0), TWO),
    (ODD, 32, torch.bfloat16, Options(radius=0, block=16), ONE),
    (RAGGED, 32, torch.float32, Options(radius=0), ONE),
    (RAGGED, 32, torch.bfloat16, Options(radius=0), TWO),
    (RAGGED, 32, torch.float32, Options(radius=0, block=16), TWO),
    (RAGGED, 32, torch.float16, Options(radius=0, block=16), ONE),
    (RAGGED, 24, torch.float32, Options(radius=1, first_order=False), TWO),
    (RAGGED, 32, torch.float32, Options(radius=0, correction=False), ONE),
    (RAGGED, 32, torch.float32, Options(radius=0, correction=False, first_order=False), TWO),
    (PLAIN, 32, torch.float32, Options(radius=0, top_k=2), ONE),
    (RAGGED, 32, torch.float32, Options(radius=0, top_k=3, block=16), TWO),
    (TokenLayout(0, ((17, 40),)), 32, torch.float32, Options(radius=0), ONE),
    (TokenLayout(0, ((8, 128),)), 32, torch.float32, Options(radius=0), ONE),
    (TokenLayout(0, ((9, 64),)), 32, torch.bfloat16, Options(radius=0), TWO),
]


@pytest.mark.parametrize(("layout", "width", "dtype", "options", "config"), CASES, ids=str)
def test_the_kernels_compute_the_definition(
    layout: TokenLayout, width: int, dtype: torch.dtype, options: Options, config: Config
) -> None:
    given = tensors(layout, width, dtype)
    wanted = reference(given, layout, options)
    found = run(given, layout, options, config=config)
    assert found.out.dtype == dtype and found.log_mass is None
    assert nmse(found.out, wanted.out) <= BOUND[dtype]
    # The bound has to tell the result from exact attention, and from the mean value.
    scale = width**-0.5
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in given), scale=scale
    )
    assert nmse(exact, wanted.out) > 10 * BOUND[dtype]


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 400])])
def test_text_goes_through_what_is_given_for_it(rows: torch.Tensor | None) -> None:
    given, options = tensors(PLAIN), Options(radius=0)
    own = run(given, PLAIN, options, log_mass_rows=rows)
    seen = []

    def dense(*tensors: torch.Tensor) -> torch.Tensor:
        seen.append([x.shape[2] for x in tensors])
        return torch.full((1, 1, 20, 32), 7.0)

    found = run(given, PLAIN, options, log_mass_rows=rows, dense=dense)
    assert seen == [[20, PLAIN.tokens, PLAIN.tokens]]
    assert bool((found.out[:, :, :20] == 7.0).all())
    assert torch.equal(found.out[:, :, 20:], own.out[:, :, 20:])
    if rows is not None:
        assert found.log_mass is not None and own.log_mass is not None
        assert torch.equal(found.log_mass, own.log_mass)


@pytest.mark.parametrize("config", [ONE, TWO])
@pytest.mark.parametrize("layout", [PLAIN, RAGGED])
def test_the_log_mass_is_the_references_text_included(layout: TokenLayout, config: Config) -> None:
    given, rows = tensors(layout), torch.arange(layout.tokens)
    wanted = reference(given, layout, Options(radius=0))
    found = run(given, layout, Options(radius=0), config=config, log_mass_rows=rows)
    assert found.log_mass is not None and wanted.log_mass is not None
    torch.testing.assert_close(found.log_mass, wanted.log_mass, rtol=1e-5, atol=1e-5)
    assert nmse(found.out, wanted.out) <= BOUND[torch.float32]


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (PLAIN, Options(radius=9)),
        (PLAIN, Options(radius=1, top_k=99)),
        (RAGGED, Options(radius=0, top_k=99)),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [ONE, TWO])
def test_all_tiles_exact_is_exact_attention(
    layout: TokenLayout, options: Options, config: Config
) -> None:
    given = tensors(layout)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in given))
    assert nmse(run(given, layout, options, config=config).out, exact) <= BOUND[torch.float32]


@pytest.mark.parametrize("options", [Options(radius=0), Options(radius=0, block=16)], ids=str)
def test_constant_values_come_out_as_they_are(options: Options) -> None:
    query, key, value = tensors(RAGGED)
    value = value[:, :, :1].expand_as(value)
    found = run([query, key, value], RAGGED, options).out
    torch.testing.assert_close(found, value.contiguous(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 2])
def test_heads_do_not_mix_and_equal_inputs_give_equal_bits(
    top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tensors(PLAIN, dtype=torch.bfloat16, heads=2)
    options = Options(radius=0, top_k=top_k)
    whole = run(given, PLAIN, options).out
    assert torch.equal(run(given, PLAIN, options).out, whole)
    # One head at a time.
    monkeypatch.setattr("attnscope.attention.tiled.triton_plan.WORKING_BYTES", 1)
    assert torch.equal(run(given, PLAIN, options).out, whole)


def test_text_may_run_in_the_loop_and_memory_may_be_strided() -> None:
    given = tensors(RAGGED, dtype=torch.bfloat16)
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    beside = run(given, RAGGED, Options(radius=0)).out
    inside = run(given, RAGGED, Options(radius=0), config=Config(text_in_kernel=True)).out
    text = RAGGED.text_tokens
    assert torch.equal(beside[:, :, text:], inside[:, :, text:])
    assert nmse(inside[:, :, :text], beside[:, :, :text].double()) <= 2e-5


def test_pooled_tiles_are_their_means() -> None:
    given = tensors(RAGGED)
    job = make_job(*given, torch.empty_like(given[0]), None, 0.5, RAGGED, Options(radius=0), ONE)
    ((first, count),) = head_runs(job)
    pooled = pool_tiles(job, first, count)
    table = job.tables
    for tile in range(table.tiles):
        rows = table.rows.view(-1, 64)[tile, : int(table.live[tile])].long()
        query, key, value = (x[0, 0, rows].double() for x in given)
        torch.testing.assert_close(pooled.query[0, tile], 0.5 * query.mean(0).float())
        torch.testing.assert_close(pooled.key[0, tile], key.mean(0).float())
        cross = (key - key.mean(0)).T @ value
        torch.testing.assert_close(pooled.norm[0, tile], cross.norm().float())
        assert torch.equal(pooled.near_key[0, tile, : len(rows)], given[1][0, 0, rows])
        assert not pooled.near_value[0, tile, len(rows) :].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": TokenLayout(20, ((24, 31),))}, "layout: holds 764 tokens"),
        ({"layout": TokenLayout(788, ())}, "layout: holds no grid"),
        ({"scale": 0.0}, "scale 0.0 is not above 0"),
    ],
)
def test_what_the_path_can_not_do_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"scale": 0.2, "layout": PLAIN} | change
    with pytest.raises(ValueError, match=message):
        tiled_attention_triton(*tensors(PLAIN), given["scale"], given["layout"], Options())


def test_wide_heads_are_refused_and_the_interpreter_counts_as_a_device() -> None:
    query, key, value = tensors(PLAIN, width=136)
    with pytest.raises(ValueError, match="head_dim 136"):
        tiled_attention_triton(query, key, value, 0.1, PLAIN, Options())
    given = tensors(TokenLayout(20, ((32, 32),)), dtype=torch.bfloat16)
    assert choose_for("auto", given[0], given[2], 0.1).path == "triton"


def test_the_variant_takes_the_path_that_is_asked_for() -> None:
    given = tensors(PLAIN, heads=2)
    rows = torch.tensor([3, 20, 787])
    results = []
    for path in ("torch", "triton"):
        settings = TiledSettings(min_tokens=0, window_radius=0, tiled_path=path)
        call = Call(
            settings, layer=None, sigma=0.5, step=9, scale=0.2, layout=PLAIN, log_mass_rows=rows
        )
        results.append(TiledVariant().attend(*given, call))
    by_torch, by_triton = results
    assert by_torch.out is not None and by_triton.out is not None
    assert not torch.equal(by_triton.out, by_torch.out)
    assert nmse(by_triton.out, by_torch.out.double()) <= BOUND[torch.float32]
    assert by_triton.log_mass is not None and by_triton.log_mass.shape == (1, 2, 3)
    torch.testing.assert_close(by_triton.log_mass, by_torch.log_mass, rtol=1e-5, atol=1e-5)
