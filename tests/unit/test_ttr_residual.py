"""The residual student: what holds exactly, its two forms, what it needs and what it learns."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from support.held_bytes import HeldBytes
from support.ttr_calls import SCALE, WIDTH, call_of, some_rows, student_of, trained
from torch.nn.functional import scaled_dot_product_attention

from attnscope.attention.exact import reference_attention
from attnscope.attention.reasons import Fallback
from attnscope.attention.structured import in_raster_order, structured_qkv
from attnscope.attention.tiled.tiles import cut
from attnscope.attention.tiled.workspace import Workspace
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr.build import build_student
from attnscope.attention.ttr.loss import LossOptions, loss
from attnscope.attention.ttr.residual import ResidualStudent
from attnscope.attention.ttr.residual_serving import outside
from attnscope.attention.ttr.student import Rows, StudentOptions, Target
from attnscope.attention.ttr.teacher import log_mass

LAYOUT = TokenLayout(5, ((32, 24),))
LAYOUTS = [
    LAYOUT,
    TokenLayout(0, ((33, 41),)),
    TokenLayout(7, ((27, 30), (17, 9), (8, 8))),
    TokenLayout(3, ((1, 60),)),
    TokenLayout(4, ((9, 9),)),
]


def residual(call: Rows, **options: int) -> ResidualStudent:
    return cast(ResidualStudent, trained(student_of("residual", **options), call))


def served(student: ResidualStudent, call: Rows, **options: object):
    return student.serve(
        call.query, call.key, call.value, call.scale, call.layout, 64, **options  # type: ignore
    )  # fmt: skip


def reference(student: ResidualStudent, call: Rows, head: int) -> tuple[torch.Tensor, ...]:
    """Output, log mass and far log mass of one head, straight from the definition, in float64."""
    layout, radius = call.layout, student.options.window_radius
    assert layout is not None
    text = layout.text_tokens
    (rows, columns), root = layout.grids[0], math.sqrt(call.scale)
    q, k, v = (x[0, head].double() for x in (call.query, call.key, call.value))
    q, k = q * root, k * root

    def beside(size: int) -> torch.Tensor:
        """Which of ``size`` tokens of a line lie in the window of each of them."""
        tiles = size // 8
        wide = min(tiles, 2 * radius + 1)
        starts = [max(0, min(place // 8 - radius, tiles - wide)) for place in range(size)]
        return torch.tensor(
            [[start <= other // 8 < start + wide for other in range(size)] for start in starts]
        )

    near = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    image = beside(rows)[:, None, :, None] & beside(columns)[None, :, None, :]
    near[text:, text:] = image.reshape(rows * columns, -1)
    weights = {name: w[head].detach().double() for name, w in student.named_parameters()}
    mean = k[text:].mean(dim=0)
    x = (q - weights["centre"]) @ weights["query_map"].T
    y = (k - mean) @ weights["key_map"].T
    shared = weights["log_share"] + (q @ mean)[:, None] + ((k - mean) @ weights["centre"])[None]
    shared = shared - weights["damping"][0] * x.square().mean(-1)[:, None] / 2
    shared = shared - weights["damping"][1] * y.square().mean(-1)[None] / 2
    total = torch.zeros_like(shared)
    for sign in (1, -1):
        for feature in range(len(weights["bias"])):
            own = sign * (x[:, feature] + weights["bias"][feature])
            total += torch.exp(own[:, None] + sign * y[None, :, feature])
    logits = torch.where(near, q @ k.T, shared + total.log())
    far = logits.masked_fill(near, -math.inf).logsumexp(-1)
    return torch.softmax(logits, -1) @ v, logits.logsumexp(-1), far


@pytest.mark.parametrize("radius", [0, 1])
def test_both_forms_are_the_definition(radius: int) -> None:
    call = call_of(LAYOUT)
    student = residual(call, window_radius=radius)
    made = student.predict(call, 1000)
    fast = served(student, call, log_mass_rows=call.index)
    for head in range(2):
        out, mass, far = reference(student, call, head)
        for found in (made.out[0, head], fast.out[0, head]):
            torch.testing.assert_close(found.double(), out, atol=1e-5, rtol=1e-5)
        for found in (made.log_mass[0, head], fast.log_mass[0, head]):
            torch.testing.assert_close(found.double(), mass, atol=1e-5, rtol=1e-5)
        assert made.far_log_mass is not None
        found = made.far_log_mass[0, head].double()
        torch.testing.assert_close(found, far, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_serving_is_prediction_on_all_rows(layout: TokenLayout, batch: int) -> None:
    call = call_of(layout, batch=batch)
    student = residual(call)
    some = torch.arange(0, layout.tokens, 3)
    with torch.no_grad():
        made = student.predict(call, 1000)
    fast = served(student, call, log_mass_rows=some)
    torch.testing.assert_close(fast.out, made.out, atol=1e-5, rtol=1e-5)
    assert fast.log_mass is not None and made.log_mass is not None
    torch.testing.assert_close(fast.log_mass, made.log_mass[:, :, some], atol=1e-5, rtol=1e-5)


def test_a_window_over_everything_is_exact_attention() -> None:
    call = call_of(LAYOUT)
    student = residual(call, window_radius=8)
    exact = scaled_dot_product_attention(call.query, call.key, call.value, scale=SCALE)
    torch.testing.assert_close(served(student, call).out, exact, atol=1e-5, rtol=1e-5)
    made = student.predict(call, 1000)
    torch.testing.assert_close(made.out, exact, atol=1e-5, rtol=1e-5)
    assert made.far_log_mass is not None and bool((made.far_log_mass == -math.inf).all())


def test_text_queries_are_exact() -> None:
    call = call_of(LAYOUT)
    exact = reference_attention(call.query, call.key, call.value, SCALE).float()
    for out in (served(residual(call), call).out, residual(call).predict(call, 1000).out):
        torch.testing.assert_close(out[:, :, :5], exact[:, :, :5], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(out[:, :, 5:], exact[:, :, 5:], atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equal_values_come_out(layout: TokenLayout) -> None:
    call = call_of(layout)
    value = torch.linspace(-2, 3, WIDTH).expand_as(call.value)
    call = Rows(call.query, call.index, call.key, value, SCALE, layout)
    student = residual(call)
    torch.testing.assert_close(served(student, call).out, value, atol=1e-5, rtol=1e-5)
    out = student.predict(call, 1000).out
    torch.testing.assert_close(out, value, atol=1e-5, rtol=1e-5)


def test_a_shift_of_all_keys_changes_nothing() -> None:
    call = call_of(LAYOUT)
    student = residual(call)
    shift = 4.0 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
    moved = Rows(call.query, call.index, call.key + shift, call.value, SCALE, LAYOUT)
    torch.testing.assert_close(
        served(student, moved).out, served(student, call).out, atol=2e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        student.predict(moved, 1000).out, student.predict(call, 1000).out, atol=2e-5, rtol=1e-4
    )


def test_the_order_of_keys_within_a_tile_does_not_matter() -> None:
    call = call_of(LAYOUT)
    student, before = residual(call), served(residual(call), call).out
    own = 5 + torch.nonzero(cut(LAYOUT, torch.device("cpu")).slots // 64 == 4).flatten()
    order = torch.arange(LAYOUT.tokens)
    order[own] = own.flip(0)
    key, value = call.key[:, :, order], call.value[:, :, order]
    after = student.serve(call.query, key, value, SCALE, LAYOUT, 64).out
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_weights_are_what_the_output_stands_for() -> None:
    call = call_of(LAYOUTS[2], batch=2)
    student = residual(call)
    rows = some_rows(call, torch.arange(0, call.key.shape[2], 5))
    weights = student.weights(rows)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert bool((weights >= 0).all())
    made = student.predict(rows, 1000)
    torch.testing.assert_close(weights @ call.value, made.out, atol=1e-5, rtol=1e-5)


def test_parts_make_up_the_whole() -> None:
    call = call_of(LAYOUT)
    made = residual(call).predict(call, 1000)
    assert made.near_out is not None and made.near_log_mass is not None
    assert made.far_out is not None and made.far_log_mass is not None
    near = made.near_log_mass.exp().unsqueeze(-1)
    far = made.far_log_mass.exp().unsqueeze(-1)
    assert bool((far[:, :, 5:] > 0).all())
    whole = (near * made.near_out + far * made.far_out) / (near + far)
    torch.testing.assert_close(whole, made.out, atol=1e-5, rtol=1e-5)
    assert made.log_mass is not None
    torch.testing.assert_close(made.log_mass, (near + far).log().squeeze(-1))


@pytest.mark.parametrize("size", [30.0, 200.0])
def test_large_exponents_stay_finite(size: float) -> None:
    call = call_of(LAYOUT)
    large = Rows(size * call.query, call.index, call.key, call.value, SCALE, LAYOUT)
    student = residual(call)
    assert bool(served(student, large).out.isfinite().all())
    made = student.predict(large, 64)
    assert bool(made.out.isfinite().all())
    made.out.square().sum().backward()
    for weight in student.parameters():
        assert weight.grad is not None and bool(weight.grad.isfinite().all())


def test_sums_beside_a_window_keep_their_digits() -> None:
    layout = TokenLayout(0, ((40, 48), (16, 8)))
    tiles = cut(layout, torch.device("cpu"))
    sums = torch.rand(2, tiles.count, 3, generator=torch.Generator().manual_seed(0)) * 1e-6
    sums[:, 7] = 1e6
    windows = torch.zeros(tiles.count, tiles.count, dtype=torch.bool)
    for tile in range(tiles.count):
        grid = next(g for g in tiles.grids if g.first <= tile < g.last)
        row, column = divmod(tile - grid.first, grid.columns)
        top = max(0, min(row - 1, grid.rows - 3))
        left = max(0, min(column - 1, grid.columns - 3))
        for y in range(top, min(top + 3, grid.rows)):
            for x in range(left, min(left + 3, grid.columns)):
                windows[tile, grid.first + y * grid.columns + x] = True
    expected = (~windows).double() @ sums.double()
    found = outside(tiles, sums, 1, Workspace(sums, torch.float32), "far")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0.0)


def test_gradients_are_differences() -> None:
    layout = TokenLayout(2, ((24, 8),))
    call = call_of(layout, dtype=torch.float64, heads=1)
    student = trained(student_of("residual", heads=1, features=4, window_radius=0), call).double()
    rows = some_rows(call, torch.tensor([0, 3, 60, 121, 190]))
    options = LossOptions(huber_beta=0.5, cosine_weight=1.0, far_weight=0.3)
    exact = reference_attention(rows.query, rows.key, rows.value, SCALE)
    logits = rows.query @ rows.key.transpose(-2, -1) * SCALE
    target = Target(exact, logits.logsumexp(-1))

    def total() -> torch.Tensor:
        return loss(student.predict(rows, 1000), target, options).total

    total().backward()
    generator = torch.Generator().manual_seed(4)
    for name, weight in student.named_parameters():
        assert weight.grad is not None
        step = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weight += 1e-6 * step
            up = total()
            weight -= 2e-6 * step
            difference = (up - total()) / 2e-6
            weight += 1e-6 * step
        expected = (weight.grad * step).sum()
        torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-7, msg=name)


def test_chunks_change_neither_result_nor_gradient() -> None:
    call = call_of(LAYOUT, batch=2)
    rows = some_rows(call, torch.arange(0, LAYOUT.tokens, 11))
    gradients = []
    for chunk in (1000, 16):
        student = residual(call)
        made = student.predict(rows, chunk)
        made.out.square().sum().backward()
        gradients.append((made.out.detach(), *(w.grad for w in student.parameters())))
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_served_in_its_dtype() -> None:
    call = call_of(LAYOUT)
    student = residual(call)
    with torch.no_grad():
        exact = student.predict(call, 1000).out
    short = (x.bfloat16() for x in (call.query, call.key, call.value))
    out = student.serve(*short, SCALE, LAYOUT, 64).out
    assert out.dtype == torch.bfloat16
    assert float((out.float() - exact).square().sum() / exact.square().sum()) < 1e-4


def test_the_first_weights_are_the_generator_s() -> None:
    options = StudentOptions("residual", 2, WIDTH, 12, 1, 0)
    call = call_of(LAYOUT)

    def weights(seed: int) -> list[torch.Tensor]:
        student = build_student(options, torch.Generator().manual_seed(seed))
        student.start(call)
        return [weight.detach() for weight in student.parameters()]

    for one, same in zip(weights(3), weights(3), strict=True):
        assert torch.equal(one, same)
    assert not torch.equal(weights(3)[0], weights(4)[0])


@pytest.mark.parametrize("kind", ["content", "positional"])
def test_training_brings_the_error_down(kind: str) -> None:
    made, _ = in_raster_order(
        structured_qkv(kind, 2.0, rows=32, columns=40, text_tokens=16, seed=3)  # type: ignore
    )
    layout = TokenLayout(16, ((32, 40),))
    q, k, v = (x.float() for x in (made.query, made.key, made.value))
    exact = reference_attention(q, k, v, made.scale, dtype=torch.float32)
    options = StudentOptions("residual", q.shape[1], q.shape[3], 64, 1, 0)
    student = build_student(options, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(layout.tokens, generator=generator)
    held, rest = order[:128], order[128:]

    def rows(index: torch.Tensor) -> Rows:
        return Rows(q[:, :, index], index, k, v, made.scale, layout)

    def error() -> float:
        with torch.no_grad():
            out = student.predict(rows(held), 1000).out
        of = exact[:, :, held]
        return float((out - of).square().sum() / of.square().sum())

    student.start(rows(rest[:256]))
    first = error()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(40):
        index = rest[torch.randperm(len(rest), generator=generator)[:64]]
        target = Target(exact[:, :, index], log_mass(q[:, :, index], k, made.scale))
        made_of = student.predict(rows(index), 1000)
        optimizer.zero_grad()
        loss(made_of, target, LossOptions(0.05, 1.0, 0.1)).total.backward()
        optimizer.step()
    assert error() < 0.7 * first
    near = student.predict(rows(held), 1000).near_out
    assert near is not None
    of = exact[:, :, held]
    dropped = float((near - of).square().sum() / of.square().sum())
    assert error() < 0.3 * dropped


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((1, 2, 773, 16), None, "does not say"),
        ((1, 2, 700, 16), LAYOUT, "773 tokens, the query 700"),
        ((1, 2, 9, 16), TokenLayout(9, ()), "no image tokens"),
    ],
)
def test_refuses_what_has_no_layout(
    shape: tuple[int, ...], layout: TokenLayout | None, words: str
) -> None:
    refused = student_of("residual").refuses(shape, shape, layout)
    assert refused is not None and refused[0] is Fallback.LAYOUT and words in refused[1]
    assert student_of("residual").refuses((1, 2, 773, 16), (1, 2, 773, 16), LAYOUT) is None


@pytest.mark.parametrize("layout", [TokenLayout(32, ((64, 64),)), TokenLayout(9, ((60, 43),))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serving_memory_is_estimated(layout: TokenLayout, dtype: torch.dtype) -> None:
    call = call_of(layout, dtype=dtype)
    student = student_of("residual", features=32)
    cut(layout, call.query.device)
    with HeldBytes() as held:
        served(student, call)
    estimate = student.serving_bytes(tuple(call.query.shape), dtype, layout, 64)
    assert 0.75 * held.peak <= estimate <= 1.25 * held.peak


@pytest.mark.parametrize("chunk", [32, 128])
def test_training_memory_is_estimated(chunk: int) -> None:
    layout = TokenLayout(32, ((64, 64),))
    call = call_of(layout)
    student = student_of("residual", features=32)
    rows = some_rows(call, torch.arange(0, layout.tokens, 32))
    with HeldBytes() as held:
        student.predict(rows, chunk).out.square().sum().backward()
    estimate = student.training_bytes(tuple(call.query.shape), len(rows.index), chunk)
    assert 0.75 * held.peak <= estimate <= 1.25 * held.peak


def test_cost_counts_pairs_and_features() -> None:
    options = StudentOptions("residual", 2, WIDTH, 12, 1, 0)
    layout = TokenLayout(64, ((64, 64),))
    shape = (1, 2, layout.tokens, WIDTH)
    pairs = 64 * layout.tokens + 4096 * (64 + 576) + 4096 * 2.5 * 12
    assert ResidualStudent.flops(shape, options, layout) == pytest.approx(2 * 4 * pairs * WIDTH)
    with pytest.raises(ValueError, match="layout"):
        ResidualStudent.flops(shape, options, None)
