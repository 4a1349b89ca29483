"""What the Triton kernels look up: rows of tiles, groups of query tiles, and their exact tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..token_layout import TokenLayout
from .far import tiles_sharing
from .pool import sampled_slots
from .tiles import SLOTS, Tiles, cut, windows

FLAG_BITS = 4
"""A listed tile is ``FLAG_BITS · number + flags``, flag 2^h meaning: exact for half h."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of one layout, int32 on the device where nothing else is said.

    Text stands in tiles behind the T tiles of the image, so that one loop reads both: A tiles in
    all. Groups are the query tiles of one program, P of them, those of text first.

    Attributes:
        tiles: T.
        all_tiles: A.
        text_groups: how many groups are of text.
        groups: ``[P, R]``, numbers of tiles; -1 for none.
        rows: ``[A·64]``, the token of each slot.
        live: ``[A]``, live slots of each tile.
        starts: ``[P]``, where a group's list begins.
        counts: ``[P]``, its length.
        listed: all lists in a row: the tiles that are exact for a group.
        exact: ``[1, T, T]`` uint8: whether the column's tile is exact for the row's.
        log_count: ``[M]`` float32, log₂ of the live slots of each block.
        sampled: slots that Σ̄ is estimated from.
        shared: query tiles that share first-order terms.
        full: whether no slot is dead, of text neither.
    """

    tiles: int
    all_tiles: int
    text_groups: int
    groups: torch.Tensor
    rows: torch.Tensor
    live: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    listed: torch.Tensor
    exact: torch.Tensor
    log_count: torch.Tensor
    sampled: int
    shared: int
    full: bool

    @property
    def image_groups(self) -> int:
        return self.groups.shape[0] - self.text_groups


@lru_cache(maxsize=16)
def tables(
    layout: TokenLayout, radius: int, block: int, together: int, device: torch.device
) -> Tables:
    """The tables of a layout, kept: making them copies from the host.

    Args:
        layout: of the tokens.
        radius: of the windows, in tiles.
        block: slots of a block, 64 or 16.
        together: R, query tiles of a program, 1 or 2.
        device: of the tensors.
    """
    with torch.inference_mode(False):
        tiles = cut(layout, torch.device("cpu"))
        text = layout.text_tokens
        text_tiles = -(-text // SLOTS)
        text_slots = torch.arange(text_tiles * SLOTS)
        live = torch.cat([tiles.live, (text - text_slots[::SLOTS]).clamp_max(SLOTS)])
        rows = torch.cat([tiles.order + text, text_slots.clamp_max(text - 1)])
        exact = _exact(tiles, radius)
        text_groups = _text_groups(tiles.count, text_tiles, together)
        image_groups = _image_groups(tiles, together)
        listed, counts = _lists(exact, image_groups, text_tiles)
        everything = torch.arange(tiles.count + text_tiles) * FLAG_BITS + (2**together - 1)
        starts = counts.cumsum(0) - counts + len(everything)
        all_groups = len(text_groups)
        blocks = torch.arange(0, SLOTS, block)
        held = (tiles.live[:, None] - blocks).clamp(0, block).flatten()

        def put(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, torch.int32)

        return Tables(
            tiles=tiles.count,
            all_tiles=tiles.count + text_tiles,
            text_groups=len(text_groups),
            groups=put(torch.cat([text_groups, image_groups])),
            rows=put(rows),
            live=put(live),
            starts=put(torch.cat([torch.zeros(all_groups), starts])),
            counts=put(torch.cat([torch.full((all_groups,), len(everything)), counts])),
            listed=put(torch.cat([everything, listed])),
            exact=exact.to(device, torch.uint8).unsqueeze(0),
            log_count=held.float().log2().to(device),
            sampled=int((sampled_slots(block)[None] < tiles.live[:, None]).sum()),
            shared=tiles_sharing(layout),
            full=tiles.full and text % SLOTS == 0,
        )


def _exact(tiles: Tiles, radius: int) -> torch.Tensor:
    exact = torch.zeros(tiles.count, tiles.count, dtype=torch.bool)
    for grid in tiles.grids:
        exact[grid.first : grid.last].scatter_(1, windows(grid, radius, exact.device), True)
    return exact


def _text_groups(first: int, count: int, together: int) -> torch.Tensor:
    return _grouped(torch.arange(first, first + count), together)


def _image_groups(tiles: Tiles, together: int) -> torch.Tensor:
    """Neighbours in a row of tiles, whose windows have most in common."""
    parts = [
        _grouped(torch.arange(start, start + grid.columns), together)
        for grid in tiles.grids
        for start in range(grid.first, grid.last, grid.columns)
    ]
    return torch.cat(parts) if parts else torch.empty(0, together, dtype=torch.int64)


def _grouped(numbers: torch.Tensor, together: int) -> torch.Tensor:
    missing = numbers.new_full((-len(numbers) % together,), -1)
    return torch.cat([numbers, missing]).view(-1, together)


def _lists(
    exact: torch.Tensor, groups: torch.Tensor, text_tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of the image's groups in a row, text first in each, and their lengths."""
    count, together = exact.shape[0], groups.shape[1]
    there = (groups >= 0).unsqueeze(-1)
    bits = 2 ** torch.arange(together)
    flags = ((exact[groups.clamp_min(0)] & there) * bits[:, None]).sum(dim=1)  # [P, T]
    text = flags.new_full((len(groups), text_tiles), 2**together - 1)
    flags = torch.cat([text, flags], dim=1)
    numbers = torch.cat([torch.arange(count, count + text_tiles), torch.arange(count)])
    listed = numbers * FLAG_BITS + flags
    return listed[flags > 0], (flags > 0).sum(dim=1)
