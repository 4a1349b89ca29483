"""The layout that calls carry, against the places that the real Flux gives its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux import LAYERS, conditioning

from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.variant import Call

pytestmark = pytest.mark.comfyui


def places(layout: TokenLayout) -> torch.Tensor:
    """Row and column of each token, ``[N, 2]``; zeros for text."""
    parts = [torch.zeros(layout.text_tokens, 2)]
    for rows, columns in layout.grids:
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(torch.stack([y, x], dim=-1).reshape(-1, 2).float())
    return torch.cat(parts)


def sampled(
    model: Any, monkeypatch: pytest.MonkeyPatch, height: int, width: int, references: list[Any]
) -> tuple[set[TokenLayout | None], list[torch.Tensor]]:
    """Layouts of all calls of a sampling, and the ids that Flux gave its tokens."""
    import nodes

    from attnscope.attention.taylor.variant import TaylorVariant

    layouts: list[TokenLayout | None] = []
    ids: list[torch.Tensor] = []
    real = TaylorVariant.gate

    def gate(self: Any, query: torch.Tensor, key: torch.Tensor, call: Call) -> Any:
        layouts.append(call.layout)
        return real(self, query, key, call)

    def post_input(given: dict[str, Any]) -> dict[str, Any]:
        ids.append(torch.cat([given["txt_ids"], given["img_ids"]], dim=1)[0])
        return given

    monkeypatch.setattr(TaylorVariant, "gate", gate)
    model = model.clone()
    model.set_model_patch(post_input, "post_input")
    positive, negative = conditioning(1, 16), conditioning(2, 16)
    if references:
        positive[0][1]["reference_latents"] = references
        # Offsets of their own would say nothing about rows and columns.
        positive[0][1]["reference_latents_method"] = "index"
    begin = {"samples": torch.zeros(2, 16, height, width)}
    with torch.inference_mode():
        nodes.common_ksampler(
            model, 7, 2, 1.0, "euler", "simple", positive, negative, begin, denoise=1.0
        )
    assert len(layouts) == 2 * len(LAYERS)
    return set(layouts), ids


@pytest.mark.parametrize(
    ("height", "width", "references"),
    [(8, 12, []), (7, 9, []), (8, 8, [(6, 10)]), (8, 6, [(4, 4), (5, 12)])],
)
def test_calls_carry_the_places_of_their_tokens(
    prepared: Any,
    monkeypatch: pytest.MonkeyPatch,
    height: int,
    width: int,
    references: list[tuple[int, int]],
) -> None:
    latents = [torch.randn(1, 16, *size) for size in references]
    found, ids = sampled(prepared("taylor"), monkeypatch, height, width, latents)
    (layout,) = found
    assert layout is not None
    assert len(layout.grids) == 1 + len(references)
    for given in ids:
        torch.testing.assert_close(given[:, 1:], places(layout))
        # What ComfyUI calls the index tells the pictures apart, in order.
        sizes = [layout.text_tokens + layout.grids[0][0] * layout.grids[0][1]]
        sizes += [rows * columns for rows, columns in layout.grids[1:]]
        assert [len(part.unique()) for part in given[:, 0].split(sizes)] == [1] * len(sizes)


def test_a_model_without_a_patch_size_has_no_layout(flux: Any) -> None:

    from attnscope.comfy_plugin.hooks import _patch_size

    assert _patch_size(flux) == 2
    assert _patch_size(object()) is None
