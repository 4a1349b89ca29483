"""Attention masks: one meaning for the forms that models pass."""

from __future__ import annotations

import torch


def expand_dims(mask: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """Give a mask four dimensions.

    Args:
        mask: boolean (True: attend) or additive float, ``[Nk]``, ``[Nq, Nk]``, ``[B, Nq, Nk]``,
            ``[B·H, Nq, Nk]`` or four-dimensional already. A two-dimensional mask is one per
            query, as in torch; with one row it serves every query.
        batch: B.
        heads: H.

    Returns:
        A view that broadcasts to ``[B, H, Nq, Nk]``.

    Raises:
        ValueError: the shape is none of these.
    """
    if mask.ndim == 1:
        return mask[None, None, None, :]
    if mask.ndim == 2:
        return mask[None, None, :, :]
    if mask.ndim == 3:
        if mask.shape[0] in (1, batch):
            return mask[:, None, :, :]
        if mask.shape[0] == batch * heads:
            return mask.reshape(batch, heads, *mask.shape[1:])
    if mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads):
        return mask
    raise ValueError(
        f"mask: shape {tuple(mask.shape)} does not fit batch {batch} and {heads} heads; allowed: "
        "[Nk], [Nq, Nk], [B, Nq, Nk], [B·H, Nq, Nk], [B, H, Nq, Nk]"
    )


def key_weights(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Weights by which a mask that is the same for every query multiplies each key's softmax term.

    A boolean mask gives 0 and 1, an additive one ``exp(mask)`` up to a common factor per head,
    which attention doesn't see.

    Args:
        mask: four-dimensional, broadcasts to ``[B, H, Nq, Nk]``.
        dtype: floating dtype of the answer.

    Returns:
        ``[B or 1, H or 1, Nk]``, or None where rows may differ.
    """
    if mask.shape[2] != 1 and mask.stride(2) != 0:
        return None
    row = mask[:, :, 0, :]
    if row.dtype == torch.bool:
        return row.to(dtype)
    row = row.to(dtype)
    # A row that is masked throughout has no largest finite entry: its weights are then all zero.
    top = row.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
    return torch.exp(row - top)


def apply(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits ``[B, H, Nq, Nk]`` with the mask's effect: added, or -inf where it is False."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask.to(logits.dtype)


def query_rows(mask: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """The mask of some queries: ``rows`` ``[S]`` int64 picks them where rows may differ."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask.index_select(2, rows)
