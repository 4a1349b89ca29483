"""The Triton paths of Taylor attention: layout, choice of path, and the kernels themselves."""

import collections
import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from support.triton_interpreter import run_interpreted

from attnscope.attention.sums_paths import NAMES, SumsPath, TiledPath
from attnscope.attention.taylor.dispatch import MIN_TOKENS, choose
from attnscope.attention.taylor.multisets import unrank
from attnscope.attention.taylor.triton_cubic_plan import BLOCK, cubic_layout
from attnscope.attention.taylor.triton_plan import base_layout, lift_layout, selection

CPU = torch.device("cpu")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheels for this platform"
)
def test_kernels_in_the_interpreter():
    run_interpreted(Path(__file__).with_name("triton_interpreted.py"))


def inverse_factorial(multiset):
    return 1 / math.prod(math.factorial(n) for n in collections.Counter(multiset).values())


@pytest.mark.parametrize(("head_dim", "terms"), [(3, 4), (5, 2), (4, 5), (2, 8)])
def test_unranking_lists_every_monomial_once_with_its_weight(head_dim, terms):
    total = math.comb(head_dim + terms - 1, terms - 1)
    parts = [unrank(start, 7, head_dim, terms, CPU) for start in range(0, total, 7)]
    coordinates = torch.cat([part[0] for part in parts], dim=1).T.tolist()
    weights = torch.cat([part[1] for part in parts]).tolist()
    wanted = set(itertools.combinations_with_replacement(range(head_dim + 1), terms - 1))
    assert len(wanted) == total
    assert {tuple(row) for row in coordinates[:total]} == wanted
    for row, weight in zip(coordinates[:total], weights, strict=False):
        assert weight == pytest.approx(inverse_factorial([c for c in row if c < head_dim]))
    assert weights[total:] == [0.0] * (len(weights) - total)


def test_unranking_reaches_ranks_beyond_32_bits():
    coordinates, weights = unrank(math.comb(135, 7) - 2, 3, 128, 8, CPU)
    assert coordinates.T.tolist()[1] == [128] * 7
    assert coordinates.T.tolist()[0] == [127] + [128] * 6
    assert weights.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(("head_dim", "degree"), [(5, 1), (16, 1), (4, 2), (7, 2)])
@pytest.mark.parametrize(("chunk", "lifts"), [(4, 1), (8, 4), (16, 2)])
def test_lifted_tiles_hold_every_monomial_of_the_next_degree_once(head_dim, degree, chunk, lifts):
    base = base_layout(head_dim, degree, chunk).coordinates.tolist()
    layout = lift_layout(head_dim, degree, chunk, lifts, lifts)
    found = {}
    for tile, weights in enumerate(layout.weights.tolist()):
        index = layout.tile_chunk[tile]
        assert layout.first[index] <= tile < layout.first[index] + layout.count[index]
        assert layout.tile_lift[tile] == (tile - layout.first[index]) * lifts
        for offset, row in enumerate(weights):
            for feature, weight in zip(base[index], row, strict=True):
                if weight:
                    monomial = (int(layout.tile_lift[tile]) + offset, *feature)
                    assert monomial not in found
                    found[monomial] = weight
    wanted = itertools.combinations_with_replacement(range(head_dim), degree + 1)
    assert found == {m: pytest.approx(inverse_factorial(m)) for m in wanted}


def test_selection_matrices_pick_both_coordinates_of_a_pair():
    x = torch.randn(3, 16)
    picks, coordinates = selection(16, 32), base_layout(16, 2, 32).coordinates
    for chunk, pairs in enumerate(coordinates):
        for side in range(2):
            wanted = torch.where(pairs[:, side] >= 0, x[:, pairs[:, side].clamp_min(0)], 0.0)
            assert torch.equal(x @ picks[side, chunk], wanted)


def choice(setting="auto", **changes):
    given = {
        "triton_reason": "",
        "dtype": torch.bfloat16,
        "head_dim": 32,
        "value_dim": 32,
        "terms": 3,
        "keys": 4608,
    }
    return choose(setting, **(given | changes))


@pytest.mark.parametrize(
    ("setting", "changes", "path", "reason"),
    [
        ("auto", {}, "full", ""),
        ("auto", {"terms": 5}, "streaming", "P 5 is above 4"),
        ("auto", {"head_dim": 128, "value_dim": 128, "terms": 4}, "streaming", "head_dim 128"),
        ("auto", {"keys": MIN_TOKENS - 1}, "torch", "fewer than"),
        ("auto", {"triton_reason": "no CUDA"}, "torch", "no CUDA"),
        ("auto", {"dtype": torch.float64}, "torch", "float64"),
        ("torch", {}, "torch", ""),
        ("streaming", {}, "streaming", ""),
        ("streaming", {"triton_reason": "no CUDA"}, "torch", "no CUDA"),
        ("full", {"keys": 10}, "full", ""),
        ("full", {"terms": 6}, "streaming", "P 6 is above 4"),
        ("full", {"terms": 9}, "torch", "P 9 is above 8"),
    ],
)
def test_path_and_reason(setting, changes, path, reason):
    found = choice(setting, **changes)
    assert found.path == path
    assert reason in found.reason
    assert bool(found.reason) == bool(reason)


@pytest.mark.parametrize(
    ("setting", "changes", "code"),
    [
        ("auto", {}, SumsPath.FULL),
        ("full", {}, SumsPath.FULL),
        ("streaming", {}, SumsPath.STREAMING),
        ("torch", {}, SumsPath.TORCH),
        ("auto", {"terms": 5}, SumsPath.STREAMING_TERMS),
        ("auto", {"head_dim": 256}, SumsPath.STREAMING_HEAD_DIM),
        ("auto", {"head_dim": 256, "value_dim": 256}, SumsPath.STREAMING_HEAD_DIM),
        ("auto", {"value_dim": 256}, SumsPath.STREAMING_VALUE_DIM),
        ("auto", {"triton_reason": "no CUDA"}, SumsPath.TORCH_NO_CUDA),
        ("full", {"triton_reason": "x", "triton_installed": False}, SumsPath.TORCH_NO_TRITON),
        ("auto", {"dtype": torch.float64}, SumsPath.TORCH_DTYPE),
        ("auto", {"keys": 10}, SumsPath.TORCH_FEW_KEYS),
        ("streaming", {"terms": 9}, SumsPath.TORCH_TERMS),
    ],
)
def test_every_choice_has_its_code(setting, changes, code):
    found = choice(setting, **changes)
    assert found.code is code
    assert NAMES[code].startswith(found.path)


def test_every_code_has_a_name_and_a_better_path_a_higher_number():
    assert set(NAMES) == set(SumsPath) | set(TiledPath)
    order = [SumsPath(code).path for code in sorted(SumsPath)]
    assert [path for path, _ in itertools.groupby(order)] == ["torch", "streaming", "full"]


def test_unknown_path_is_refused():
    with pytest.raises(ValueError, match=r"taylor_path: unknown value 'fast'; allowed: auto"):
        choice("fast")


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "most"), [(5, 16, 64), (20, 128, 64), (32, 32, 128)]
)
def test_cubic_tiles_hold_every_monomial_up_to_degree_3_once(head_dim, value_dim, most):
    layout = cubic_layout(head_dim, value_dim, most)
    coordinates = {}
    for table, factors in enumerate(layout.chosen):
        for row in range(factors.shape[1]):
            picked = [factors[side, row].nonzero().flatten().tolist() for side in range(2)]
            ones = layout.ones[table, :, row].tolist()
            # A factor is one coordinate or 1; where a chunk is padded it is nothing.
            assert all(len(p) + one in (0, 1) for p, one in zip(picked, ones, strict=True))
            coordinates[table, row] = [*picked[0], *picked[1]]
    found = {}
    for tile, weights in enumerate(layout.weights):
        group = tile // layout.chunks
        block = group * layout.lifts // BLOCK
        for row, lift in weights.nonzero().tolist():
            feature = coordinates[block * layout.chunks + tile % layout.chunks, row]
            monomial = tuple(sorted((*feature, group * layout.lifts + lift)))
            assert monomial not in found
            found[monomial] = float(weights[row, lift])
    wanted = {
        monomial
        for degree in (1, 2, 3)
        for monomial in itertools.combinations_with_replacement(range(head_dim), degree)
    }
    assert set(found) == wanted
    for monomial, weight in found.items():
        assert weight == pytest.approx(inverse_factorial(monomial))
    for block in range(len(layout.chosen) // layout.chunks):
        for chunk in range(layout.common):
            assert torch.equal(layout.chosen[block * layout.chunks + chunk], layout.chosen[chunk])
            assert not layout.ones[block * layout.chunks + chunk].any()
