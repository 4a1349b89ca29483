"""What all heads of a call on the Triton path share, and which heads are computed at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from ..taylor.triton_support import check_inputs, rows_contiguous
from ..token_layout import TokenLayout
from .options import Options, picked_tiles, window_tiles
from .tiles import SLOTS, tile_count
from .triton_plan import (
    Config,
    Sizes,
    default_config,
    heads_together,
    padded,
    refusal,
    wide_dtype,
)
from .triton_tables import Tables, tables


def kernels(name: str) -> ModuleType:
    """A module of kernels of this package, by name.

    Raises:
        ImportError: triton is not installed or does not load.
    """
    return importlib.import_module(f".{name}", __package__)


def triton_dtype(dtype: torch.dtype) -> object:
    """Triton's name for a dtype."""
    language = importlib.import_module("triton.language")
    return getattr(language, str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class Job:
    """What is the same for all heads of a call.

    Attributes:
        query: ``[B, H, N, D]``, last dimension contiguous, as are the next two.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, Dv]``.
        out: ``[B, H, N, Dv]``, to be filled.
        mass: ``[B, H, N]`` float32, to be filled; None where not wanted.
        scale: factor on q·k.
        tables: of the layout.
        options: of the approximation.
        picks: tiles that each query tile picks beside its window.
        has_far: whether any tile is not exact for any other.
        config: tile sizes.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    mass: torch.Tensor | None
    scale: float
    tables: Tables
    options: Options
    picks: int
    has_far: bool
    config: Config

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.query.dtype)

    @property
    def widths(self) -> tuple[int, int]:
        """Padded widths of key and value."""
        return padded(self.query.shape[3]), padded(self.value.shape[3])

    @property
    def blocks(self) -> int:
        """Blocks of a tile."""
        return SLOTS // self.options.block

    @property
    def precision(self) -> str:
        """Of products of float32: three tf32 ones, about 2⁻²¹. Others ignore it."""
        return "tf32x3"


def make_job(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    mass: torch.Tensor | None,
    scale: float,
    layout: TokenLayout,
    options: Options,
    config: Config | None,
) -> Job:
    """Check a call and settle what all its heads share; arguments as `tiled_attention_triton`'s.

    Raises:
        ValueError: shapes, dtypes or a scale that this path does not take.
    """
    check_inputs(query, key, value, None)
    tokens = query.shape[2]
    if layout.tokens != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"layout: holds {layout.tokens} tokens; allowed: those of query ({tokens}) and key "
            f"({key.shape[2]})"
        )
    if not layout.grids:
        raise ValueError("layout: holds no grid; allowed: one or more")
    refused = refusal(query.dtype, query.shape[3], value.shape[3], scale)
    if refused:
        raise ValueError(f"Triton path: {refused[1]}")
    picks = picked_tiles(tile_count(layout), layout, options)
    config = config or default_config(query.dtype)
    table = tables(layout, options.radius, options.block, config.together, query.device)
    least = min(window_tiles(grid, options.radius) for grid in layout.grids)
    return Job(
        rows_contiguous(query), rows_contiguous(key), rows_contiguous(value), out, mass,
        scale, table, options, picks, picks > 0 or least < table.tiles, config,
    )  # fmt: skip


def head_runs(job: Job) -> Iterator[tuple[int, int]]:
    """First head and number of heads that are computed at a time, of the B·H."""
    total = job.query.shape[0] * job.query.shape[1]
    table = job.tables
    sizes = Sizes(table.tiles, table.all_tiles, table.shared, *job.widths)
    step = heads_together(sizes, total, job.query.dtype, job.options, job.picks)
    for first in range(0, total, step):
        yield first, min(step, total - first)
