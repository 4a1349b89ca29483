"""The reference attention and the meaning of masks, against torch's own."""

from __future__ import annotations

import pytest
import torch

from attnscope.attention import masks
from attnscope.attention.exact import reference_attention

SCALE = 0.3


def tensors(queries: int = 11, keys: int = 13) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64)
        for tokens in (queries, keys, keys)
    )


MASKS = {
    "none": None,
    "keys": torch.arange(13) < 7,
    "rows": torch.rand(11, 13, generator=torch.Generator().manual_seed(0)) < 0.7,
    "batch": torch.rand(2, 11, 13, generator=torch.Generator().manual_seed(1)) < 0.7,
    "batch-heads": torch.randn(6, 11, 13, generator=torch.Generator().manual_seed(2)).double(),
    "full": torch.randn(2, 3, 11, 13, generator=torch.Generator().manual_seed(3)).double(),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [4, 100])
def test_reference_equals_torch(name: str, block: int) -> None:
    q, k, v = tensors()
    mask = MASKS[name]
    full = None if mask is None else masks.expand_dims(mask, 2, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=full, scale=SCALE
    )
    torch.testing.assert_close(
        reference_attention(q, k, v, SCALE, full, query_block=block), expected
    )


def test_mask_shapes_that_fit_nothing_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"mask: shape \(5, 11, 13\).*allowed"):
        masks.expand_dims(torch.ones(5, 11, 13), 2, 3)


def test_key_weights_of_an_additive_mask_reproduce_it() -> None:
    q, k, v = tensors()
    additive = torch.randn(1, 1, 1, 13, dtype=torch.float64)
    weights = masks.key_weights(additive, torch.float64)
    assert weights is not None
    terms = torch.exp(q @ k.transpose(-2, -1) * SCALE) * weights[:, :, None, :]
    torch.testing.assert_close(
        terms @ v / terms.sum(-1, keepdim=True), reference_attention(q, k, v, SCALE, additive)
    )


def test_key_weights_know_which_masks_differ_between_queries() -> None:
    row = torch.ones(1, 1, 1, 13, dtype=torch.bool)
    assert masks.key_weights(row, torch.float32) is not None
    assert masks.key_weights(row.expand(2, 3, 11, 13), torch.float32) is not None
    assert masks.key_weights(row.expand(2, 3, 11, 13).contiguous(), torch.float32) is None


def test_a_row_masked_throughout_has_weights_zero() -> None:
    weights = masks.key_weights(torch.full((1, 1, 1, 4), float("-inf")), torch.float32)
    assert weights is not None and weights.tolist() == [[[0.0, 0.0, 0.0, 0.0]]]
