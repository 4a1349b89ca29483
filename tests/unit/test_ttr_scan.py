"""The founding student: both directions, chunks, what it needs."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from support.held_bytes import HeldBytes
from support.ttr_calls import SCALE, WIDTH, call_of, some_rows, student_of, trained

from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr.scan import ScanStudent
from attnscope.attention.ttr.student import Rows, StudentOptions

LAYOUT = TokenLayout(5, ((11, 9),))


def scan(call: Rows) -> ScanStudent:
    return cast(ScanStudent, trained(student_of("scan"), call))


def reference(student: ScanStudent, call: Rows) -> torch.Tensor:
    """The definition, token by token, in float64."""
    w = {name: x.detach().double() for name, x in student.named_parameters()}

    def phi(x: torch.Tensor) -> torch.Tensor:
        hidden = x.double() * SCALE**0.5 @ w["first"].T + w["first_bias"]
        return (hidden * torch.sigmoid(hidden)) @ w["second"].T + w["second_bias"]

    q, k, v = phi(call.query), phi(call.key), call.value.double()
    out = torch.zeros_like(v)
    tokens = v.shape[2]
    for order in (range(tokens), reversed(range(tokens))):
        sums = torch.zeros(*v.shape[:2], k.shape[-1], v.shape[-1], dtype=torch.float64)
        for seen, i in enumerate(order, start=1):
            sums += k[:, :, i, :, None] * v[:, :, i, None, :]
            out[:, :, i] += (q[:, :, i, None] @ sums).squeeze(-2) / seen / 2
    return out


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_both_forms_are_the_definition(chunk: int) -> None:
    call = call_of(LAYOUT, batch=2)
    student = scan(call)
    expected = reference(student, call)
    made = student.predict(call, chunk)
    torch.testing.assert_close(made.out.double(), expected, atol=1e-5, rtol=1e-4)
    out = student.serve(call.query, call.key, call.value, SCALE, None, chunk).out
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
    assert made.log_mass is None and student.weights(call) is None


def test_training_starts_near_the_running_mean_of_values() -> None:
    call = call_of(LAYOUT)
    value = torch.linspace(-2, 3, WIDTH).expand_as(call.value)
    same = Rows(call.query, call.index, call.key, value, SCALE, LAYOUT)
    out = student_of("scan", features=64).predict(same, 1000).out.detach()
    assert float((out - value).square().mean() / value.square().mean()) < 0.1


def test_the_order_of_tokens_matters() -> None:
    call = call_of(LAYOUT)
    student, order = scan(call), torch.arange(LAYOUT.tokens).roll(7)
    moved = (x[:, :, order] for x in (call.query, call.key, call.value))
    out = student.serve(*moved, SCALE, None, 16).out
    before = student.serve(call.query, call.key, call.value, SCALE, None, 16).out
    assert not torch.allclose(out, before[:, :, order], atol=1e-2)


def test_no_layout_is_needed() -> None:
    assert student_of("scan").refuses((1, 2, 9, 16), (1, 2, 9, 16), None) is None
    refused = student_of("scan").refuses((1, 2, 9, 16), (1, 2, 8, 16), None)
    assert refused is not None and "9" in refused[1] and "8" in refused[1]


def test_gradients_are_differences() -> None:
    call = call_of(LAYOUT, dtype=torch.float64)
    student = scan(call).double()
    rows = some_rows(call, torch.arange(0, LAYOUT.tokens, 9))

    def total() -> torch.Tensor:
        return student.predict(rows, 5).out.square().sum()

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


def test_bfloat16_is_served_in_its_dtype() -> None:
    call = call_of(LAYOUT)
    student = scan(call)
    exact = student.predict(call, 1000).out.detach()
    short = (x.bfloat16() for x in (call.query, call.key, call.value))
    out = student.serve(*short, SCALE, LAYOUT, 64).out
    assert out.dtype == torch.bfloat16
    assert float((out.float() - exact).square().sum() / exact.square().sum()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [8, 128])
def test_serving_memory_is_estimated(dtype: torch.dtype, chunk: int) -> None:
    call = call_of(TokenLayout(32, ((32, 16),)), dtype=dtype)
    student = student_of("scan", features=32)
    with HeldBytes() as held:
        student.serve(call.query, call.key, call.value, SCALE, None, chunk)
    estimate = student.serving_bytes(tuple(call.query.shape), dtype, None, chunk)
    assert 0.75 * held.peak <= estimate <= 1.25 * held.peak


@pytest.mark.parametrize("chunk", [32, 128])
def test_training_memory_is_estimated(chunk: int) -> None:
    layout = TokenLayout(32, ((64, 64),))
    call = call_of(layout)
    student = student_of("scan", features=32)
    rows = some_rows(call, torch.arange(0, layout.tokens, 32))
    with HeldBytes() as held:
        student.predict(rows, chunk).out.square().sum().backward()
    estimate = student.training_bytes(tuple(call.query.shape), len(rows.index), chunk)
    assert 0.75 * held.peak <= estimate <= 1.25 * held.peak


def test_cost_counts_features_and_sums() -> None:
    options = StudentOptions("scan", 2, WIDTH, 12, 1, 0)
    expected = 2 * LAYOUT.tokens * (4 * 12 * (WIDTH + 12) + 8 * 12 * WIDTH)
    assert ScanStudent.flops((1, 2, LAYOUT.tokens, WIDTH), options, None) == expected
