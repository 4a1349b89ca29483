"""Tiled attention against exact attention: what must hold exactly, and what error may be left."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.attention.exact import reference_attention
from attnscope.attention.structured import in_raster_order, structured_qkv
from attnscope.attention.tiled import sizes
from attnscope.attention.tiled.attend import tiled_attention
from attnscope.attention.tiled.options import Options
from attnscope.attention.tiled.sizes import Sizes
from attnscope.attention.tiled.tiles import cut
from attnscope.attention.token_layout import TokenLayout

SCALE = 16**-0.5
ALL = Options(radius=64)


def tensors(
    layout: TokenLayout, *, batch: int = 1, heads: int = 2, width: int = 16, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.tokens, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def every(layout: TokenLayout) -> torch.Tensor:
    return torch.arange(layout.tokens)


@lru_cache(maxsize=8)
def structured(kind: str, std: float) -> tuple[torch.Tensor, ...]:
    """Query, key, value in raster order of 48×48 and 64 of text, and the exact output."""
    made, _ = in_raster_order(
        structured_qkv(kind, std, rows=48, columns=48, text_tokens=64, seed=3)  # type: ignore
    )
    exact = reference_attention(made.query, made.key, made.value, made.scale)
    return made.query, made.key, made.value, exact


def error(kind: str, std: float, **options: object) -> float:
    query, key, value, exact = structured(kind, std)
    layout = TokenLayout(64, ((48, 48),))
    chosen = Options(**options)  # type: ignore[arg-type]
    out = tiled_attention(query, key, value, 128**-0.5, layout, chosen).out
    return float((out.double() - exact).square().sum() / exact.square().sum())


LAYOUTS = [
    TokenLayout(16, ((16, 16),)),
    TokenLayout(0, ((24, 16),)),
    TokenLayout(5, ((17, 23),)),
    TokenLayout(3, ((1, 40),)),
    TokenLayout(7, ((9, 9),)),
    TokenLayout(4, ((2, 3),)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_tiles_exact_is_exact_attention(layout: TokenLayout) -> None:
    query, key, value = tensors(layout)
    expected = reference_attention(query, key, value, SCALE)
    result = tiled_attention(query, key, value, SCALE, layout, ALL, log_mass_rows=every(layout))
    torch.testing.assert_close(result.out, expected)
    mass = (query @ key.transpose(-2, -1) * SCALE).logsumexp(dim=-1)
    assert result.log_mass is not None
    torch.testing.assert_close(result.log_mass, mass.float())


TWO_GRIDS = TokenLayout(6, ((24, 17), (10, 24)))


def test_picking_every_tile_of_two_grids_is_exact_attention() -> None:
    """The window ends at its grid's edge; a reference latent's tiles are picked or pooled."""
    query, key, value = tensors(TWO_GRIDS, batch=2)
    expected = reference_attention(query, key, value, SCALE)
    # 9 and 6 tiles; a window has all 9 tiles of the first grid or all 6 of the second.
    out = tiled_attention(query, key, value, SCALE, TWO_GRIDS, Options(radius=1, top_k=9)).out
    first = 6 + 24 * 17
    torch.testing.assert_close(out[:, :, :first], expected[:, :, :first])
    # The second grid's windows are smaller, and 6 more of 9 are all that is picked for each.
    assert not torch.allclose(out[:, :, first:], expected[:, :, first:], atol=1e-6)


APPROXIMATE = [
    Options(radius=0),
    Options(radius=1),
    Options(radius=0, first_order=False),
    Options(radius=0, correction=False),
    Options(radius=0, block=16),
    Options(radius=0, top_k=2),
    Options(radius=0, top_k=2, block=16, first_order=False),
]
GRIDS = [
    TokenLayout(8, ((32, 32),)),
    TokenLayout(8, ((27, 41),)),
    TokenLayout(0, ((33, 20),)),
    TokenLayout(8, ((16, 24), (24, 9))),
]


@pytest.mark.parametrize("options", APPROXIMATE, ids=str)
@pytest.mark.parametrize("layout", GRIDS, ids=str)
def test_constant_values_come_out_as_they_are(layout: TokenLayout, options: Options) -> None:
    query, key, _ = tensors(layout, batch=2)
    row = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = row.expand_as(key)
    out = tiled_attention(query, key, value, SCALE, layout, options).out
    torch.testing.assert_close(out, value.clone())


@pytest.mark.parametrize("options", APPROXIMATE, ids=str)
@pytest.mark.parametrize("layout", GRIDS, ids=str)
def test_a_shift_of_all_keys_changes_nothing(layout: TokenLayout, options: Options) -> None:
    query, key, value = tensors(layout)
    shift = torch.randn(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = tiled_attention(query, key, value, SCALE, layout, options).out
    after = tiled_attention(query, key + shift, value, SCALE, layout, options).out
    torch.testing.assert_close(after, before)


def test_the_order_of_keys_in_a_far_tile_does_not_matter() -> None:
    layout = TokenLayout(8, ((32, 32),))
    query, key, value = tensors(layout)
    tile = cut(layout, query.device).order.view(-1, 64)[15] + 8
    mixed = tile[torch.randperm(64, generator=torch.Generator().manual_seed(4))]
    options = Options(radius=0, correction=False)
    before = tiled_attention(query, key, value, SCALE, layout, options).out
    key[:, :, tile], value[:, :, tile] = key[:, :, mixed], value[:, :, mixed]
    after = tiled_attention(query, key, value, SCALE, layout, options).out
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("kind", ["content", "positional"])
@pytest.mark.parametrize("std", [1.0, 2.0, 4.0])
def test_the_error_falls_with_radius_tiles_and_finer_blocks(kind: str, std: float) -> None:
    base = error(kind, std)
    assert error(kind, std, radius=2) < base < error(kind, std, radius=0)
    assert error(kind, std, top_k=4) < base
    assert error(kind, std, block=16) < base
    assert base < 0.006


@pytest.mark.parametrize("kind", ["content", "positional"])
@pytest.mark.parametrize("std", [1.0, 2.0])
def test_the_error_falls_with_order_and_correction(kind: str, std: float) -> None:
    base = error(kind, std)
    assert base < 0.6 * error(kind, std, first_order=False)
    assert base < 0.6 * error(kind, std, correction=False)


def test_what_the_error_is_measured_against_is_no_mean() -> None:
    """The mean of the values, which a broken attention tends to, is far from passing."""
    _, _, value, exact = structured("content", 1.0)
    mean = value.double().mean(dim=2, keepdim=True)
    assert float((mean - exact).square().sum() / exact.square().sum()) > 0.05


@pytest.mark.parametrize("kind", ["content", "positional"])
@pytest.mark.parametrize("std", [1.0, 2.0, 4.0])
def test_the_mass_is_nearly_that_of_exact_attention(kind: str, std: float) -> None:
    query, key, value, _ = structured(kind, std)
    layout = TokenLayout(64, ((48, 48),))
    scale = 128**-0.5
    exact = (query.double() @ key.double().transpose(-2, -1) * scale).logsumexp(dim=-1)

    def bias(options: Options) -> float:
        result = tiled_attention(
            query, key, value, scale, layout, options, log_mass_rows=every(layout)
        )
        assert result.log_mass is not None
        return float((result.log_mass - exact).mean())

    assert abs(bias(Options())) < 0.05
    # Jensen: without the correction, the mass is too small.
    assert bias(Options(correction=False)) < min(0.0, -abs(bias(Options())))


@pytest.mark.parametrize("options", APPROXIMATE, ids=str)
@pytest.mark.parametrize("layout", GRIDS, ids=str)
def test_the_mass_is_that_which_the_output_was_divided_by(
    layout: TokenLayout, options: Options
) -> None:
    """Where the value is 1 at one text key alone, the output is that key's share."""
    layout = TokenLayout(max(1, layout.text_tokens), layout.grids)
    query, key, value = tensors(layout, batch=2)
    value = torch.zeros_like(value)
    value[:, :, 0] = 1.0
    rows = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(2))[:40]
    result = tiled_attention(query, key, value, SCALE, layout, options, log_mass_rows=rows)
    logits = SCALE * (query[:, :, rows] * key[:, :, :1]).sum(dim=-1)
    assert result.log_mass is not None
    mass = logits - result.out[:, :, rows, 0].log()
    torch.testing.assert_close(result.log_mass, mass.float(), rtol=1e-4, atol=1e-4)


def test_text_goes_through_what_is_given_for_it() -> None:
    layout = TokenLayout(5, ((20, 26),))
    query, key, value = tensors(layout)

    def dense(*tensors: torch.Tensor) -> torch.Tensor:
        assert [x.shape[2] for x in tensors] == [5, layout.tokens, layout.tokens]
        return torch.full((1, 2, 5, 16), 7.0)

    own = tiled_attention(query, key, value, SCALE, layout, Options()).out
    given = tiled_attention(query, key, value, SCALE, layout, Options(), dense=dense).out
    assert bool((given[:, :, :5] == 7.0).all())
    assert torch.equal(given[:, :, 5:], own[:, :, 5:])


@pytest.mark.parametrize("options", APPROXIMATE, ids=str)
@pytest.mark.parametrize("layout", GRIDS, ids=str)
def test_other_sizes_of_work_give_the_same(
    layout: TokenLayout, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many heads at a time, whose windows are gathered, and short runs of query tiles."""
    query, key, value = tensors(layout, batch=2, heads=3)
    expected = tiled_attention(
        query, key, value, SCALE, layout, options, log_mass_rows=every(layout)
    )
    for bounds in (
        Sizes(2**30, 2**30, 2**30, 2**30),
        Sizes(0, 1, 1, 1),
        Sizes(2**21, 2**18, 2**15, 2**13),
    ):
        monkeypatch.setattr(sizes, "CPU_SIZES", bounds)
        found = tiled_attention(
            query, key, value, SCALE, layout, options, log_mass_rows=every(layout)
        )
        torch.testing.assert_close(found.out, expected.out)
        torch.testing.assert_close(found.log_mass, expected.log_mass)


def test_heads_and_pictures_do_not_mix() -> None:
    layout = TokenLayout(5, ((20, 26),))
    query, key, value = tensors(layout, batch=2, heads=3)
    whole = tiled_attention(query, key, value, SCALE, layout, Options(radius=0)).out
    for row in range(2):
        for head in range(3):
            one = (slice(row, row + 1), slice(head, head + 1))
            alone = tiled_attention(
                query[one], key[one], value[one], SCALE, layout, Options(radius=0)
            ).out
            torch.testing.assert_close(alone, whole[one])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_rounding(dtype: torch.dtype) -> None:
    query, key, value, exact = structured("content", 2.0)
    layout = TokenLayout(64, ((48, 48),))
    rounded = [x.to(dtype) for x in (query, key, value)]
    out = tiled_attention(*rounded, 128**-0.5, layout, Options()).out
    assert out.dtype == dtype
    wide = tiled_attention(*(x.float() for x in rounded), 128**-0.5, layout, Options()).out
    torch.testing.assert_close(out.float(), wide, rtol=0.02, atol=0.02)
    assert float((out.double() - exact).square().sum() / exact.square().sum()) < 0.01


def test_values_may_be_of_another_width_and_memory_of_any_order() -> None:
    layout = TokenLayout(5, ((16, 24),))
    query, key, _ = tensors(layout)
    value = tensors(layout, width=24, seed=5)[2]
    expected = tiled_attention(query, key, value, SCALE, layout, Options(radius=0)).out
    assert expected.shape[-1] == 24
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert not turned[0].is_contiguous()
    found = tiled_attention(*turned, SCALE, layout, Options(radius=0)).out
    torch.testing.assert_close(found, expected)


def test_logits_of_any_size_stay_finite() -> None:
    layout = TokenLayout(8, ((32, 32),))
    query, key, value = (x.float() for x in tensors(layout))
    for options in APPROXIMATE:
        out = tiled_attention(query * 60, key * 60, value, SCALE, layout, options).out
        assert out.isfinite().all()
        assert out.abs().max() <= value.abs().max() * 50


def test_a_layout_of_other_tokens_is_refused() -> None:
    query, key, value = tensors(TokenLayout(8, ((8, 8),)))
    with pytest.raises(ValueError, match="layout: holds 73 tokens; allowed: those of query"):
        tiled_attention(query, key, value, SCALE, TokenLayout(9, ((8, 8),)), Options())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    text=st.integers(0, 5),
    radius=st.integers(0, 3),
    top_k=st.integers(0, 3),
)
def test_any_grid_keeps_the_identities(
    rows: int, columns: int, text: int, radius: int, top_k: int
) -> None:
    layout = TokenLayout(text, ((rows, columns), (columns, 3)))
    query, key, value = tensors(layout, heads=1, width=8)
    options = Options(radius=radius, top_k=top_k)
    result = tiled_attention(
        query, key, value, SCALE, layout, options, log_mass_rows=every(layout)
    )
    assert result.out.isfinite().all()
    assert result.log_mass is not None and result.log_mass.isfinite().all()
    ones = tiled_attention(query, key, torch.ones_like(value), SCALE, layout, options).out
    torch.testing.assert_close(ones, torch.ones_like(ones))
    if text:
        exact = reference_attention(query[:, :, :text], key, value, SCALE)
        torch.testing.assert_close(result.out[:, :, :text], exact)
