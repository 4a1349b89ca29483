"""Triton kernels in Triton's interpreter, against float64. `test_taylor_triton` runs this file.

The interpreter must be chosen before triton is imported and stays for the process, so these
tests have a process of their own; pytest does not collect the file by its name.

Bounds are NMSE. fp32 operands: 1e-11, a few fp32 roundings. bf16 operands: 1e-5, from roundings
of 2⁻⁹ each in features, sums and values, where values have mean 0 and so cancel.
"""

import math

import pytest
import torch

from attnscope.attention.taylor import (
    kernel,
    triton_cubic,
    triton_full,
    triton_project,
    triton_stream,
)
from attnscope.attention.taylor.attend import Options, taylor_attention
from attnscope.attention.taylor.paths import TritonSums, pick
from attnscope.attention.taylor.triton_cubic_plan import CubicConfig, cubic_config
from attnscope.attention.taylor.triton_memory import full_memory_bytes, streaming_memory_bytes
from attnscope.attention.taylor.triton_plan import (
    FullConfig,
    check_config,
    default_config,
    split_count,
)
from attnscope.attention.taylor.triton_stream import StreamConfig

BOUND = {torch.float32: 1e-11, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def tensors(head_dim, value_dim, dtype, *, queries=21, keys=45, heads=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    # Logits of standard deviation 1, the scale shared between both sides.
    root = head_dim**-0.25
    return (
        (normal(1, heads, queries, head_dim) * root).to(dtype),
        (normal(1, heads, keys, head_dim) * root).to(dtype),
        normal(1, heads, keys, value_dim).to(dtype),
    )


def reference(query, key, value, terms, weights=None):
    """The definition, in float64, without features."""
    logits = query.double() @ key.double().transpose(-1, -2)
    term, kernel = torch.ones_like(logits), torch.zeros_like(logits)
    for degree in range(terms):
        kernel += term
        term = term * logits / (degree + 1)
    if weights is not None:
        kernel = kernel * weights.double()[:, :, None]
    return kernel @ value.double(), kernel.sum(-1, keepdim=True)


def nmse(found, wanted):
    return float((found.double() - wanted).square().sum() / wanted.square().sum())


def assert_close(found, wanted, dtype):
    for name, left, right in zip(("numerator", "denominator"), found, wanted, strict=True):
        assert left.dtype == torch.float32 and left.shape == right.shape, name
        assert nmse(left, right) <= BOUND[dtype], name
    # The bound has to tell the result from one that is equal for all queries; P = 1 is.
    mean = wanted[0].mean(2, keepdim=True).expand_as(wanted[0])
    assert torch.allclose(mean, wanted[0]) or nmse(mean, wanted[0]) > 100 * BOUND[dtype]


FULL = [
    # head_dim, value_dim, P, dtype
    (32, 32, 1, torch.bfloat16),
    (32, 32, 2, torch.bfloat16),
    (32, 32, 3, torch.float32),
    (32, 32, 3, torch.bfloat16),
    (32, 32, 3, torch.float16),
    (32, 128, 3, torch.bfloat16),
    (64, 64, 3, torch.bfloat16),
    (72, 96, 3, torch.bfloat16),
    (8, 16, 4, torch.float32),
    (20, 24, 4, torch.bfloat16),
    (32, 32, 4, torch.bfloat16),
]


@pytest.mark.parametrize(("head_dim", "value_dim", "terms", "dtype"), FULL)
def test_fully_fused_sums_match_the_definition(head_dim, value_dim, terms, dtype):
    query, key, value = tensors(head_dim, value_dim, dtype)
    # Few large tiles where the default's many small ones would take the interpreter long.
    config = FullConfig(chunk=128, lifts=1) if head_dim > 64 else None
    found = triton_full.sums(query, key, value, terms, config=config)
    assert_close(found, reference(query, key, value, terms), dtype)


STREAMED = [
    # head_dim, value_dim, P, dtype, options
    (16, 16, 1, torch.bfloat16, {}),
    (16, 20, 2, torch.float32, {}),
    (32, 32, 3, torch.bfloat16, {"feature_chunk": 256}),
    (32, 32, 3, torch.bfloat16, {"store_bf16": True, "value_chunk": 16}),
    (64, 64, 3, torch.bfloat16, {"block_f": 128}),
    (96, 96, 2, torch.bfloat16, {}),
    (128, 130, 2, torch.bfloat16, {}),
    (12, 16, 4, torch.float32, {"feature_chunk": 192}),
    (8, 16, 5, torch.bfloat16, {"feature_chunk": 128}),
    (6, 16, 5, torch.float32, {}),
    (3, 16, 8, torch.float32, {"feature_chunk": 64}),
]


@pytest.mark.parametrize(("head_dim", "value_dim", "terms", "dtype", "options"), STREAMED)
def test_streamed_sums_match_the_definition(head_dim, value_dim, terms, dtype, options):
    query, key, value = tensors(head_dim, value_dim, dtype)
    found = triton_stream.sums(query, key, value, terms, config=StreamConfig(**options))
    assert_close(found, reference(query, key, value, terms), dtype)


def paths():
    return [
        pytest.param(triton_full.sums, 3, id="full-3"),
        pytest.param(triton_full.sums, 4, id="full-4"),
        pytest.param(triton_stream.sums, 3, id="stream-3"),
    ]


@pytest.mark.parametrize(("sums", "terms"), [*paths(), pytest.param(triton_full.sums, 1, id="1")])
@pytest.mark.parametrize("per_head", [False, True])
def test_weights_count_and_masked_keys_may_hold_anything(sums, terms, per_head):
    query, key, value = tensors(5, 16, torch.float32, heads=2)
    weights = torch.rand(1, 2 if per_head else 1, key.shape[2]) + 0.1
    weights[..., 3:11] = 0
    wanted = reference(query, key, value, terms, weights)
    key[:, :, 3:11] = float("nan")
    value[:, :, 3:11] = float("inf")
    found = sums(query, key, value, terms, weights=weights)
    assert_close(found, wanted, torch.float32)


@pytest.mark.parametrize(("sums", "terms"), paths())
def test_equal_inputs_give_equal_bits(sums, terms):
    query, key, value = tensors(8, 16, torch.bfloat16, heads=2)
    first, second = (sums(query, key, value, terms) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("sums", "terms"), paths())
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (65, 33)])
def test_lengths_need_not_be_multiples_of_a_tile(sums, terms, queries, keys):
    query, key, value = tensors(5, 16, torch.float32, queries=queries, keys=keys)
    found, wanted = sums(query, key, value, terms), reference(query, key, value, terms)
    assert nmse(found[0], wanted[0]) < 1e-11 and nmse(found[1], wanted[1]) < 1e-11


@pytest.mark.parametrize(("sums", "terms"), paths())
def test_strided_views_give_what_their_copies_give(sums, terms):
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in tensors(6, 16, torch.bfloat16, heads=2)
    ]
    found = sums(*views, terms)
    copies = sums(*(x.contiguous() for x in views), terms)
    assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))


@pytest.mark.parametrize("terms", [3, 4])
def test_splits_over_keys_change_only_the_order_of_the_sum(terms, monkeypatch):
    query, key, value = tensors(6, 16, torch.float32, keys=100)
    whole = triton_full.sums(query, key, value, terms)
    monkeypatch.setattr(triton_full, "split_count", lambda *_: 3)
    split = triton_full.sums(query, key, value, terms)
    wanted = reference(query, key, value, terms)
    for a, b, c in zip(whole, split, wanted, strict=True):
        assert not torch.equal(a, b) or a.numel() < 50
        assert nmse(b, c) < 1e-11


@pytest.mark.parametrize(
    "config",
    [
        FullConfig(chunk=16, lifts=1, block_t=32, block_m=64, build_warps=2, read_warps=4),
        FullConfig(chunk=16, lifts=2, block_t=32, block_m=32, build_warps=2, read_warps=2),
        FullConfig(chunk=16, lifts=2, build_lifts=2, block_t=64, build_warps=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("terms", [3, 4])
def test_tile_sizes_do_not_change_the_result(config, terms):
    query, key, value = tensors(12, 16, torch.bfloat16)
    found = triton_full.sums(query, key, value, terms, config=config)
    assert_close(found, reference(query, key, value, terms), torch.bfloat16)


def test_memory_of_the_fully_fused_path_covers_what_it_holds():
    query, key, value = tensors(32, 32, torch.bfloat16)
    config = default_config(32, 32, 4, torch.bfloat16)
    held = triton_full.build(key, value, 4, weights=None, config=config)
    parts = (held.s_1, held.s_2, held.s_top, held.z_2, held.z_3)
    # The last sums are built from their partial ones, fp32, while all others are held.
    partial = held.s_top.numel() * 4
    assert partial > query.shape[2] * 33 * 4, "the results come when it has gone"
    estimate = full_memory_bytes(
        1, query.shape[2], key.shape[2], 32, 32, 4, torch.bfloat16, processors=1, config=config
    )
    assert estimate == sum(part.numel() * 2 for part in parts) + partial


def test_memory_of_the_cubic_kernels_covers_what_they_hold():
    query, key, value = tensors(32, 32, torch.bfloat16)
    held = triton_full.build(key, value, 4, weights=None, config=CubicConfig())
    elements = held.sums.numel() + held.masses.numel()
    estimate = full_memory_bytes(
        1, query.shape[2], key.shape[2], 32, 32, 4, torch.bfloat16, processors=1
    )
    assert estimate == elements * 2 + elements * 4


SMALL = CubicConfig(chunk=64, block_t=32, block_m=64, columns=64, build_warps=4, read_warps=4)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "config"),
    [(24, 24, SMALL), (16, 80, CubicConfig()), (8, 40, CubicConfig())],
)
def test_cubic_tiles_do_not_change_the_result(head_dim, value_dim, config):
    query, key, value = tensors(head_dim, value_dim, torch.bfloat16)
    found = triton_full.sums(query, key, value, 4, config=config)
    assert_close(found, reference(query, key, value, 4), torch.bfloat16)


def test_cubic_sums_leave_masked_keys_alone_and_may_be_split(monkeypatch):
    query, key, value = tensors(16, 16, torch.bfloat16, keys=200, heads=2)
    weights = torch.rand(1, 2, 200) + 0.1
    weights[..., 3:11] = 0
    wanted = reference(query, key, value, 4, weights)
    key[:, :, 3:11] = float("nan")
    value[:, :, 3:11] = float("inf")
    assert_close(triton_full.sums(query, key, value, 4, weights=weights), wanted, torch.bfloat16)
    monkeypatch.setattr(triton_cubic, "split_count", lambda *_: 3)
    assert_close(triton_full.sums(query, key, value, 4, weights=weights), wanted, torch.bfloat16)


def test_cubic_tiles_fit_the_shared_memory_of_the_gpu():
    assert cubic_config(32, 227 * 1024) == CubicConfig()
    smaller = cubic_config(32, 99 * 1024)
    assert smaller is not None and smaller.chunk < CubicConfig().chunk
    assert cubic_config(64, 227 * 1024) == smaller
    assert cubic_config(32, 64 * 1024) is None
    chosen = triton_full.chosen_config(32, 32, 4, torch.bfloat16, 64 * 1024)
    assert chosen == default_config(32, 32, 4, torch.bfloat16)
    assert isinstance(triton_full.chosen_config(32, 32, 4, torch.float32, 2**20), FullConfig)


def test_memory_of_the_streaming_path_does_not_grow_with_the_feature_dimension():
    small, large = (
        streaming_memory_bytes(24, 4608, 128, 128, terms, torch.bfloat16) for terms in (4, 5)
    )
    assert large < 1.01 * small
    assert large < full_memory_bytes(24, 4608, 4608, 64, 64, 4, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (1, 1, 45, 8)}, "key: shape"),
        ({"value": (1, 1, 44, 16)}, "value: shape"),
        ({"weights": (1, 3, 45)}, "weights: shape"),
    ],
)
@pytest.mark.parametrize("sums", [triton_full.sums, triton_stream.sums])
def test_bad_shapes_are_named(sums, change, message):
    query, key, value = tensors(16, 16, torch.float32)
    given = {"key": key, "value": value} | {n: torch.zeros(s) for n, s in change.items()}
    with pytest.raises(ValueError, match=message):
        sums(query, given["key"], given["value"], 3, weights=given.get("weights"))


def test_dtypes_and_sizes_that_no_kernel_takes_are_refused():
    query, key, value = tensors(16, 16, torch.float64)
    with pytest.raises(ValueError, match=r"dtype: torch\.float64"):
        triton_full.sums(query, key, value, 3)
    query, key, value = tensors(16, 16, torch.float32)
    with pytest.raises(ValueError, match="P 5 is above 4"):
        triton_full.sums(query, key, value, 5)
    with pytest.raises(ValueError, match="P 9 is above 8"):
        triton_stream.sums(query, key, value, 9)


def test_splits_fill_the_processors_and_never_get_tiny():
    assert split_count(1, 100_000, 132) == 100_000 // 512
    assert split_count(96, 16_896, 132) == math.ceil(8 * 132 / 96)
    assert split_count(1, 100, 132) == 1


@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_paths_stand_in_for_the_torch_sums(path, weighted):
    query, key, value = tensors(16, 24, torch.float32, heads=2)
    weights = torch.rand(1, 2, key.shape[2]) if weighted else None
    sums = TritonSums(path, torch.float32, StreamConfig(feature_chunk=64))
    for constant in (True, False):
        found = sums(query, key, value, 3, weights=weights, constant=constant)
        wanted = kernel.sums(
            query.double(), key.double(), value.double(), 3, weights=weights, constant=constant
        )
        assert_close(found, wanted, torch.float32)


@pytest.mark.parametrize(("queries", "keys"), [(1, 3), (65, 67)])
@pytest.mark.parametrize("weighted", [False, True])
def test_four_terms_in_16_bits_at_odd_lengths(queries, keys, weighted):
    query, key, value = tensors(16, 16, torch.bfloat16, queries=queries, keys=keys)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(1, 1, keys, generator=generator) + 0.1 if weighted else None
    found = triton_full.sums(query, key, value, 4, weights=weights)
    wanted = reference(query, key, value, 4, weights)
    # Of so few terms some sums cancel: errors are relative to what would be left without.
    scale = reference(query, key, value.abs(), 4, weights)[0].square().sum()
    assert (found[0].double() - wanted[0]).square().sum() <= 1e-5 * scale
    assert nmse(found[1], wanted[1]) <= 1e-5


def test_tile_sizes_that_compile_to_wrong_code_are_refused():
    query, key, value = tensors(16, 16, torch.bfloat16)
    config = FullConfig(chunk=64)
    with pytest.raises(ValueError, match=r"chunk: 64 .* head_dim 16, .* P 4; allowed: up to 16"):
        triton_full.sums(query, key, value, 4, config=config)
    triton_full.sums(query, key, value, 3, config=config)
    with pytest.raises(ValueError, match="build_lifts: 4 is not allowed"):
        triton_full.sums(query, key, value, 3, config=FullConfig(lifts=8, build_lifts=4))
    with pytest.raises(ValueError, match="read_stages: 1 is not allowed"):
        triton_full.sums(query, key, value, 4, config=CubicConfig(read_stages=1))
    wrong = FullConfig(chunk=64, lifts=8, read_warps=8)
    with pytest.raises(ValueError, match="lifts: 8 is not allowed with chunk 64 and read_warps 8"):
        triton_full.sums(query, key, value, 3, config=wrong)
    for head_dim, value_dim in ((8, 16), (32, 32), (64, 128), (64, 20)):
        config = default_config(head_dim, value_dim, 4, torch.bfloat16)
        check_config(config, head_dim, value_dim, 4, torch.bfloat16)


def test_moments_may_be_split_over_the_samples(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(1, 2, 400, 16, generator=generator) + 0.5 for _ in range(2))
    means = [x.mean(2).flatten(0, 1) for x in (query, key)]

    def found():
        a, b = triton_project.factors(
            query, key, 4, query_mean=means[0], key_mean=means[1], query_root=0.7,
            key_root=0.7, parts=1,
        )  # fmt: skip
        return a @ b.transpose(1, 2)

    split = found()
    monkeypatch.setattr(triton_project, "_SPLITS", 1)
    whole = found()
    # The order of the sums differs, so their last bits do.
    assert not torch.equal(split, whole)
    assert nmse(split, whole) <= 1e-9


@pytest.mark.parametrize(
    ("change", "scale", "dtype"),
    [
        ({}, 0.1, torch.float32),
        ({"sub_head_blocks": 1}, -0.05, torch.float32),
        ({"centre_queries": False}, 0.1, torch.float32),
        ({"centre_keys": False, "centre_values": False}, -0.1, torch.float32),
        ({"round_denominators": True}, 0.1, torch.float16),
        ({}, 0.1, torch.bfloat16),
        ({"feature_projection": 8}, 0.1, torch.float32),
        ({"feature_projection": 20, "sub_head_blocks": 1}, -0.05, torch.bfloat16),
        ({"feature_projection": 8, "centre_queries": False}, 0.1, torch.bfloat16),
    ],
)
def test_whole_heads_in_few_passes_match_float64(change, scale, dtype):
    terms = 3
    batch = 1 if change else 2
    generator = torch.Generator().manual_seed(3)
    # Means far from 0, tokens before heads in memory, as a projection leaves them.
    query, key, value = (
        (torch.randn(batch, 67, 2, 32, generator=generator) + 0.5).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    options = Options(**({"sub_head_blocks": 2, "sub_head_mode": "independent"} | change))
    _, sums = pick("full", StreamConfig(), options, query, value, terms)
    assert sums.takes_whole(terms, options, 32)
    found = taylor_attention(query, key, value, scale, terms, options=options, sums=sums)
    exact = (x.double() for x in (query, key, value))
    wanted = taylor_attention(*exact, scale, terms, options=options)
    bound = 1e-10 if dtype == torch.float32 else 5e-5
    assert found.out.dtype == dtype and found.out.shape == query.shape
    assert nmse(found.out, wanted.out) <= bound
    assert nmse(found.denominator, wanted.denominator) <= bound
    mean = wanted.out.mean(2, keepdim=True).expand_as(wanted.out)
    assert nmse(mean, wanted.out) > 10 * bound


@pytest.mark.parametrize(
    ("options", "path", "weighted"),
    [
        (Options(), "full", False),
        (Options(), "full", True),
        (Options(sub_head_blocks=2), "full", False),
        (Options(sub_head_blocks=2), "streaming", True),
        (Options(feature_projection=24), "full", False),
    ],
)
def test_rounding_of_centred_values_averages_out(options, path, weighted):
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(1, 1, 400, 32, generator=generator).to(torch.bfloat16) for _ in range(3)
    )
    weights = torch.rand(1, 1, 400, generator=generator) if weighted else None
    _, sums = pick(path, StreamConfig(), options, query, value, 3)

    def attend(*tensors, **given):
        answer = taylor_attention(*tensors, 32**-0.5, 3, weights=weights, options=options, **given)
        return answer.out

    found = attend(query, key, value, sums=sums)
    wanted = attend(*(x.double() for x in (query, key, value)))
    # The mean's own rounding would make 1e-4, and more with more keys.
    assert nmse(found, wanted) < 2e-5


@pytest.mark.parametrize("mode", ["independent", "shared"])
def test_whole_heads_come_out_the_same_on_every_path(mode):
    query, key, value = tensors(32, 32, torch.float32, heads=2)
    options = Options(sub_head_blocks=2, sub_head_mode=mode)
    wanted = taylor_attention(query, key, value, 1.0, 3, options=options).out.double()
    for path in ("full", "streaming"):
        choice, sums = pick(path, StreamConfig(), options, query, value, 3)
        assert choice.path == path
        found = taylor_attention(query, key, value, 1.0, 3, options=options, sums=sums).out
        assert nmse(found, wanted) <= 1e-10
