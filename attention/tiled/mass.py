"""The softmax mass of a few queries, which what is measured of a call compares with exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .field import Field
from .products import multiply
from .sizes import sizes
from .tiles import SLOTS, Tiles


def log_mass(
    query: torch.Tensor,
    text_key: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    tiles: Tiles,
    field: Field,
) -> torch.Tensor:
    """Log of the joint denominator, of some rows alone.

    The rows' logits with all keys, those left out that a row sees as pseudo-keys. That costs a
    row as much as exact attention's logits; a pass over the logits of all rows would cost more.

    Args:
        query: of the rows, ``[G, S, D]``, the scale already in it.
        text_key: ``[G, text tokens, D]``.
        key: ``[G, T, 64, D]``.
        rows: ``[S]`` int64, counted from the first text token.
        tiles: T of them.
        field: what is approximated.

    Returns:
        ``[G, S]`` in the query's dtype. Text rows see every key exactly.
    """
    text = text_key.shape[1]
    is_text = (rows < text).unsqueeze(-1)
    own = tiles.slots[(rows - text).clamp_min(0)] // SLOTS
    slot = torch.arange(SLOTS, device=rows.device)
    dead = slot >= tiles.live[:, None]
    keys = torch.cat([text_key, key.flatten(1, 2)], dim=1).transpose(-2, -1)
    parts = []
    for some in _blocks(query, keys.shape[2]):
        chosen, on_text, tile = query[:, some], is_text[some], own[some]
        logits = multiply(chosen, keys)
        left_out = dead.flatten().expand(len(tile), -1)
        if field.pooled is not None and field.bias is not None and field.excluded is not None:
            far = (field.excluded[:, tile] == 0) & ~on_text  # [G or 1, s, T]
            left_out = left_out | far.repeat_interleave(SLOTS, dim=-1)
            pseudo = multiply(chosen, field.pooled.key.transpose(-2, -1)) + field.bias[:, tile]
            logits = torch.cat([logits, pseudo.masked_fill(on_text, -math.inf)], dim=-1)
        logits[..., text : keys.shape[2]].masked_fill_(left_out, -math.inf)
        parts.append(logits.logsumexp(dim=-1))
    return torch.cat(parts, dim=1)


def _blocks(query: torch.Tensor, keys: int) -> Iterator[slice]:
    """Rows whose logits are held at a time."""
    row = query.element_size() * query.shape[0] * keys
    step = max(1, sizes(query.device).logits // row)
    for first in range(0, query.shape[1], step):
        yield slice(first, first + step)
