"""The structured synthetic set: what its description promises."""

from __future__ import annotations

import pytest
import torch

from attnscope.attention.structured import (
    KINDS,
    before_rotation,
    in_raster_order,
    logit_std,
    random_fields,
    rotate,
    structured_qkv,
    token_ids,
)
from attnscope.attention.token_layout import TokenLayout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("std", [1.0, 3.0])
def test_logits_have_the_wished_standard_deviation(kind: str, std: float) -> None:
    made = structured_qkv(kind, std, rows=16, columns=24, heads=2, seed=3)  # type: ignore[arg-type]
    assert made.query.shape == made.key.shape == made.value.shape == (1, 2, 256 + 16 * 24, 128)
    logits = made.query.double() @ made.key.double().transpose(-2, -1) * made.scale
    centred = logits - logits.mean(dim=-1, keepdim=True)
    spread = centred.square().mean(dim=(-2, -1)).sqrt()
    assert spread.flatten().tolist() == pytest.approx([std, std], rel=1e-5)
    assert logit_std(made.query, made.key, made.scale).flatten().tolist() == pytest.approx(
        spread.flatten().tolist(), rel=1e-4
    )


def test_a_seed_is_a_set_whatever_the_number_of_heads() -> None:
    sizes = {"rows": 8, "columns": 16}
    one = structured_qkv("content", 1.0, seed=5, **sizes)  # type: ignore[arg-type]
    two = structured_qkv("content", 1.0, seed=5, heads=2, **sizes)  # type: ignore[arg-type]
    other = structured_qkv("content", 1.0, seed=6, **sizes)  # type: ignore[arg-type]
    assert torch.equal(one.query, two.query[:, :1])
    assert torch.equal(one.value, two.value[:, :1])
    assert not torch.equal(two.query[:, 0], two.query[:, 1])
    assert not torch.equal(one.key, other.key)


@pytest.mark.parametrize("kind", ["content", "positional"])
def test_query_and_key_are_rms_normed_alike(kind: str) -> None:
    made = structured_qkv(kind, 2.0, rows=8, columns=8)  # type: ignore[arg-type]
    norms = torch.stack([made.query, made.key]).norm(dim=-1)
    torch.testing.assert_close(norms, norms[0, 0, 0, 0].expand_as(norms))


def test_text_comes_first_at_place_zero_and_the_image_in_tiles() -> None:
    ids = token_ids(16, 24, 5)
    assert not bool(ids[:5].any()) and not bool(ids[:, 0].any())
    tiles = ids[5:, 1:].reshape(-1, 64, 2)
    assert len(tiles) == 6
    for number, tile in enumerate(tiles):
        corner = torch.tensor([number // 3 * 8, number % 3 * 8])
        inside = tile - corner
        assert inside.tolist() == [[y, x] for y in range(8) for x in range(8)]


def test_text_is_not_rotated_and_logits_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 128, generator=generator, dtype=torch.float64).unbind(0)
    places = torch.tensor([[0, 0, 0], [0, 3, 5], [0, 13, 25], [0, 7, 2], [0, 17, 22]])
    turned_q, turned_k = rotate(q.expand(5, 128), places), rotate(k.expand(5, 128), places)
    assert torch.equal(turned_q[0], q)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(5))
    torch.testing.assert_close(turned_q[1] @ turned_k[2], turned_q[3] @ turned_k[4])
    assert float(turned_q[1] @ turned_k[2]) != pytest.approx(float(q @ k), rel=1e-3)


def test_turned_back_they_rotate_to_what_they_were_and_text_is_as_it_was() -> None:
    made = structured_qkv("positional", 2.0, rows=16, columns=8, text_tokens=8)
    made, _ = in_raster_order(made)
    for before, after in zip(before_rotation(made), (made.query, made.key), strict=True):
        torch.testing.assert_close(rotate(before, made.ids), after, rtol=1e-4, atol=1e-5)
        assert torch.equal(before[:, :, :8], after[:, :, :8])
        # The first image token stands at (0, 0), as text does.
        assert (before - after)[:, :, 9:].norm(dim=-1).min() > 1.0


def test_fields_have_unit_variance_and_the_spectrums_correlation() -> None:
    """The power spectrum exp(-(wπf)²) is that of the autocorrelation exp(-(r/w)²)."""
    fields = random_fields(64, 64, 64, 4.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(fields.var(dim=(0, 1), correction=0), torch.ones(64).double())
    for distance in (1, 3, 5):
        measured = float((fields * fields.roll(distance, 0)).mean())
        assert measured == pytest.approx(2.718281828 ** -((distance / 4.0) ** 2), abs=0.03)


def test_positional_heads_have_the_larger_means() -> None:
    """The mean key stands out most in the channels that turn slowly."""

    def share(kind: str) -> float:
        made = structured_qkv(kind, 1.0, rows=16, columns=16)  # type: ignore[arg-type]
        key = made.key[0, 0]
        return float(key.mean(dim=0).square().sum() / key.square().sum(dim=-1).mean())

    assert share("positional") > 1.5 * share("content") > 15 * share("iso")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "smooth"}, "kind: is 'smooth'; allowed: content, positional, iso"),
        ({"std": 0.0}, "std: is 0.0; allowed: a number above 0"),
        ({"std": float("nan")}, "std: is nan"),
        ({"rows": 12}, "rows: is 12; allowed: a multiple of 8"),
        ({"columns": 0}, "columns: is 0; allowed: a multiple of 8"),
        ({"text_tokens": -1}, "text_tokens: is -1"),
        ({"heads": 0}, "heads: is 0"),
    ],
)
def test_bad_arguments_are_named(values: dict[str, object], named: str) -> None:
    arguments: dict[str, object] = {"kind": "content", "std": 1.0, **values}
    with pytest.raises(ValueError, match=named):
        structured_qkv(**arguments)  # type: ignore[arg-type]


def test_half_precision_is_cast_last() -> None:
    sizes = {"rows": 8, "columns": 8, "text_tokens": 0}
    exact = structured_qkv("positional", 1.0, dtype=torch.float64, **sizes)  # type: ignore[arg-type]
    half = structured_qkv("positional", 1.0, dtype=torch.bfloat16, **sizes)  # type: ignore[arg-type]
    assert half.query.dtype == torch.bfloat16
    assert torch.equal(half.key, exact.key.to(torch.bfloat16))


def test_raster_order_is_that_of_the_places() -> None:
    made = structured_qkv("content", 1.0, rows=16, columns=24, text_tokens=5)
    raster, layout = in_raster_order(made)
    assert layout == TokenLayout(5, ((16, 24),))
    y, x = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    assert torch.equal(raster.ids[5:, 1:], torch.stack([y, x], dim=-1).reshape(-1, 2))
    # Every token keeps its query, key and value.
    token = int((made.ids[5:] == torch.tensor([0, 9, 17])).all(dim=1).nonzero()) + 5
    for before, after in zip(
        (made.query, made.key, made.value), (raster.query, raster.key, raster.value), strict=True
    ):
        assert torch.equal(after[:, :, :5], before[:, :, :5])
        assert torch.equal(after[:, :, 5 + 9 * 24 + 17], before[:, :, token])
