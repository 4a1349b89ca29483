"""The softmax mass of a few queries, which what is measured of a call compares with exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .field import Field
from .products import multiply
from .sizes import sizes
from .tiles import SLOTS, Tiles
from .workspace import Workspace


def log_mass(
    query: torch.Tensor,
    text_key: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    tiles: Tiles,
    field: Field,
    space: Workspace,
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
        space: holds the logits.

    Returns:
        ``[G, S]`` in the query's dtype. Text rows see every key exactly.
    """
    text, count = text_key.shape[1], tiles.count
    heads, keys = query.shape[0], text + count * SLOTS
    is_text = (rows < text).unsqueeze(-1)
    own = tiles.slots[(rows - text).clamp_min(0)] // SLOTS
    slot = torch.arange(SLOTS, device=rows.device)
    dead = slot >= tiles.live[:, None]
    pooled = field.pooled
    columns = keys if pooled is None else keys + pooled.key.shape[1]
    parts = []
    for some in _blocks(query, columns):
        chosen, on_text, tile = query[:, some], is_text[some], own[some]
        # The loop over query tiles is done with it.
        logits = space.take("logits", (heads, chosen.shape[1], columns))
        multiply(chosen, text_key.transpose(-2, -1), out=logits[..., :text])
        multiply(chosen, key.flatten(1, 2).transpose(-2, -1), out=logits[..., text:keys])
        near = logits[..., text:keys].view(heads, -1, count, SLOTS)
        if not tiles.full:
            near.masked_fill_(dead, -math.inf)
        if pooled is not None and field.bias is not None and field.excluded is not None:
            far = (field.excluded[:, tile] == 0) & ~on_text  # [G or 1, s, T]
            near.masked_fill_(far.unsqueeze(-1), -math.inf)
            pseudo = logits[..., keys:]
            multiply(chosen, pooled.key.transpose(-2, -1), out=pseudo)
            pseudo.add_(field.bias[:, tile]).masked_fill_(on_text, -math.inf)
        parts.append(logits.logsumexp(dim=-1))
    return torch.cat(parts, dim=1)


def _blocks(query: torch.Tensor, columns: int) -> Iterator[slice]:
    """Rows whose logits are held at a time."""
    row = query.element_size() * query.shape[0] * columns
    step = max(1, sizes(query.device).logits // row)
    for first in range(0, query.shape[1], step):
        yield slice(first, first + step)
