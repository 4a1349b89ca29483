"""Where tokens stand: the layout itself, and how the plugin reads it from a model's inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnscope.attention.token_layout import TokenLayout
from attnscope.comfy_plugin.token_layout import LayoutReader


def read(
    latent: tuple[int, ...] = (1, 16, 8, 12),
    context: tuple[int, ...] | None = (1, 16, 64),
    references: Any = None,
    *,
    patch_size: int | None = 2,
    queries: int = 40,
    keys: int | None = None,
    options: Any = None,
) -> TokenLayout | None:
    reader = LayoutReader(patch_size)
    reader.model_called(
        torch.empty(latent, device="meta"),
        None if context is None else torch.empty(context, device="meta"),
        references,
    )
    return reader.read(queries, queries if keys is None else keys, options)


def test_counts_its_tokens() -> None:
    layout = TokenLayout(16, ((4, 6), (3, 3)))
    assert (layout.image_tokens, layout.tokens) == (33, 49)
    assert layout == TokenLayout(16, ((4, 6), (3, 3)))
    assert hash(layout) == hash(TokenLayout(16, ((4, 6), (3, 3))))


@pytest.mark.parametrize(("text", "grids"), [(-1, ((1, 1),)), (0, ((0, 4),)), (0, ((4, 0),))])
def test_refuses_what_no_sequence_has(text: int, grids: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"(text_tokens|grids): .*allowed: whole|a whole"):
        TokenLayout(text, grids)


def test_text_comes_first_and_then_the_latent_in_patches() -> None:
    assert read() == TokenLayout(16, ((4, 6),))
    assert read((3, 16, 8, 12)) == TokenLayout(16, ((4, 6),))
    assert read((1, 16, 1, 8, 12)) == TokenLayout(16, ((4, 6),))


def test_an_odd_latent_is_padded_to_whole_patches() -> None:
    assert read((1, 16, 7, 11)) == TokenLayout(16, ((4, 6),))


def test_reference_latents_follow_in_their_order() -> None:
    references = [torch.empty(1, 16, 4, 6), torch.empty(1, 16, 10, 2)]
    expected = TokenLayout(16, ((4, 6), (2, 3), (5, 1)))
    assert read(references=references, queries=51) == expected
    # Without them the numbers disagree, and nothing is certain.
    assert read(queries=51) is None


def test_what_the_model_says_comes_before_the_context() -> None:
    # The text encoder's tokens and those in the sequence need not be as many.
    assert read(context=(1, 9, 64), options={"img_slice": [16, 40]}) == TokenLayout(16, ((4, 6),))
    assert read(context=None, options={"img_slice": (16, 40)}) == TokenLayout(16, ((4, 6),))
    # Said of another sequence.
    assert read(options={"img_slice": [16, 41]}) == TokenLayout(16, ((4, 6),))
    assert read(options={"img_slice": [15, 40]}) is None


@pytest.mark.parametrize(
    "given",
    [
        {"queries": 41},
        {"keys": 16},
        {"patch_size": None},
        {"context": None},
        {"context": (16, 64)},
        {"latent": (1, 16, 96)},
        {"latent": (1, 16, 2, 8, 12)},
        {"references": [torch.empty(16)]},
        {"references": "none"},
    ],
)
def test_nothing_is_said_that_is_not_certain(given: dict[str, Any]) -> None:
    assert read(**given) is None


def test_nothing_is_known_before_the_model_is_called() -> None:
    assert LayoutReader(2).read(40, 40, {"img_slice": [16, 40]}) is None
