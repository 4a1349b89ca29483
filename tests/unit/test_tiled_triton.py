"""The Triton path of tiled attention: choice of path, tables, memory, and the kernels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support.triton_interpreter import run_interpreted

from attnscope.attention.sums_paths import NAMES, TiledPath
from attnscope.attention.tiled import dispatch, triton_plan
from attnscope.attention.tiled.dispatch import MIN_TOKENS, Choice, choose
from attnscope.attention.tiled.options import Options
from attnscope.attention.tiled.tiles import cut, windows
from attnscope.attention.tiled.triton_tables import FLAG_BITS, Tables, tables
from attnscope.attention.token_layout import TokenLayout

CPU = torch.device("cpu")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheels for this platform"
)
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("triton_interpreted_tiled.py"))


def choice(setting: Any = "auto", **changes: Any) -> Choice:
    given = {
        "device_type": "cuda",
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "value_dim": 128,
        "tokens": 4608,
        "scale": 128**-0.5,
    }
    return choose(setting, **(given | changes))


@pytest.mark.parametrize(
    ("setting", "changes", "code", "reason"),
    [
        ("auto", {}, TiledPath.TRITON, ""),
        ("auto", {"dtype": torch.float16}, TiledPath.TRITON, ""),
        ("auto", {"dtype": torch.float32}, TiledPath.TORCH_FLOAT32, "float32 runs in torch"),
        ("triton", {"dtype": torch.float32}, TiledPath.TRITON, ""),
        ("triton", {"dtype": torch.float64}, TiledPath.TORCH_DTYPE, "float64"),
        ("auto", {"tokens": MIN_TOKENS - 1}, TiledPath.TORCH_FEW_TOKENS, "fewer than"),
        ("triton", {"tokens": 10}, TiledPath.TRITON, ""),
        ("auto", {"head_dim": 160}, TiledPath.TORCH_WIDTH, "head_dim 160"),
        ("triton", {"value_dim": 256}, TiledPath.TORCH_WIDTH, "value width 256"),
        ("triton", {"scale": 0.0}, TiledPath.TORCH_SCALE, "scale 0.0"),
        ("triton", {"capability": (7, 5)}, TiledPath.TORCH_OLD_GPU, "compute capability (7, 5)"),
        ("auto", {"capability": (8, 6)}, TiledPath.TRITON, ""),
        ("torch", {}, TiledPath.TORCH, ""),
    ],
)
def test_path_and_reason(
    setting: str, changes: dict[str, Any], code: TiledPath, reason: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(dispatch, "unavailable", lambda _: "")
    found = choice(setting, **changes)
    assert found.code is code
    assert found.path == ("triton" if code is TiledPath.TRITON else "torch")
    assert NAMES[code].lower().startswith(found.path)
    assert reason in found.reason
    assert bool(found.reason) == bool(reason)


@pytest.mark.parametrize("installed", [True, False])
def test_without_cuda_or_triton_torch_runs(installed: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatch, "unavailable", lambda device: f"no Triton on {device}")
    monkeypatch.setattr(dispatch, "triton_installed", lambda: installed)
    for setting in ("auto", "triton"):
        found = choice(setting, device_type="cpu")
        code = TiledPath.TORCH_NO_CUDA if installed else TiledPath.TORCH_NO_TRITON
        assert (found.code, found.reason) == (code, "no Triton on cpu")


def test_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tiled_path: unknown value 'fast'; allowed: auto"):
        choice("fast")


LAYOUTS = [
    TokenLayout(20, ((24, 32),)),
    TokenLayout(0, ((19, 27), (8, 13))),
    TokenLayout(130, ((9, 40), (24, 24))),
]


def listed(table: Tables, group: int) -> dict[int, int]:
    """Flags of each tile in a group's list."""
    start, count = int(table.starts[group]), int(table.counts[group])
    entries = table.listed[start : start + count].tolist()
    assert len({entry // FLAG_BITS for entry in entries}) == count
    return {entry // FLAG_BITS: entry % FLAG_BITS for entry in entries}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("radius", [0, 1])
def test_lists_hold_the_text_and_the_windows(
    layout: TokenLayout, together: int, radius: int
) -> None:
    table = tables(layout, radius, 64, together, CPU)
    near = {
        grid_tile: set(row)
        for grid in cut(layout, CPU).grids
        for grid_tile, row in zip(
            range(grid.first, grid.last), windows(grid, radius, CPU).tolist(), strict=True
        )
    }
    text = set(range(table.tiles, table.all_tiles))
    seen = []
    for group, members in enumerate(table.groups.tolist()):
        flags = listed(table, group)
        for half, tile in enumerate(members):
            if tile < 0:
                continue
            seen.append(tile)
            exact = {other for other, bits in flags.items() if bits >> half & 1}
            everything = set(range(table.all_tiles))
            assert exact == (everything if tile in text else near[tile] | text)
    assert sorted(seen) == list(range(table.all_tiles))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_hold_every_token_once(layout: TokenLayout) -> None:
    table = tables(layout, 1, 16, 1, CPU)
    slots = table.rows.view(-1, 64)
    alive = torch.arange(64) < table.live[:, None]
    assert sorted(slots[alive].tolist()) == list(range(layout.tokens))
    assert int(table.log_count.exp2().sum()) == layout.image_tokens


def test_heads_are_run_in_parts_whose_memory_is_bounded() -> None:
    layout, options = TokenLayout(512, ((256, 256),)), Options()
    sizes = triton_plan.Sizes.of(layout, 128, 128)
    each = triton_plan.bytes_per_head(sizes, torch.bfloat16, options, 0)
    step = triton_plan.heads_together(sizes, 24, torch.bfloat16, options, 0)
    assert step * each <= triton_plan.WORKING_BYTES < 24 * each
    assert 24 % step == 0


def test_memory_grows_with_tokens_and_with_what_is_kept() -> None:
    def needed(side: int, **options: Any) -> int:
        layout = TokenLayout(512, ((side, side),))
        return triton_plan.memory_bytes(layout, 24, 128, 128, torch.bfloat16, Options(**options))

    assert needed(64) < needed(128) < needed(256) < 2.5 * 2**30
    assert needed(128, first_order=False) < needed(128) < needed(128, top_k=8)
