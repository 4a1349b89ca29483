"""The kernel student: means of values by weights, two forms, what it needs."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from support.held_bytes import HeldBytes
from support.ttr_calls import SCALE, WIDTH, call_of, some_rows, student_of, trained
from torch.nn.functional import scaled_dot_product_attention

from attnscope.attention.reasons import Fallback
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr.kernel import KernelStudent, landmark_places
from attnscope.attention.ttr.student import Rows, StudentOptions

LAYOUT = TokenLayout(5, ((24, 17), (9, 8)))


def kernel(call: Rows, **options: int) -> KernelStudent:
    return cast(KernelStudent, trained(student_of("kernel", **options), call))


def served(student: KernelStudent, call: Rows) -> torch.Tensor:
    out = student.serve(call.query, call.key, call.value, SCALE, call.layout, 64).out
    return cast(torch.Tensor, out)


def reference(student: KernelStudent, call: Rows, head: int) -> torch.Tensor:
    """Output of one head from the definition, in float64."""
    layout = call.layout
    assert layout is not None
    q, k, v = (x[0, head].double() for x in (call.query, call.key, call.value))
    w = {name: x[head].detach().double() for name, x in student.named_parameters()}

    def phi(x: torch.Tensor, side: str) -> torch.Tensor:
        z = x * SCALE**0.5 @ w[f"{side}_map"].T + w[f"{side}_bias"]
        return torch.where(z > 0, z + 1, z.exp())

    weights = phi(q, "query") @ phi(k, "key").T
    weights = weights / weights.sum(-1, keepdim=True)
    places = landmark_places(layout, student.options.landmarks, torch.device("cpu"))
    exact = torch.softmax(q @ k[places].T * SCALE, -1) @ v[places]
    share = 1 / (1 + (-w["share"]).exp())
    return (1 - share) * (weights @ v) + share * exact


def test_both_forms_are_the_definition() -> None:
    call = call_of(LAYOUT)
    student = kernel(call)
    for out in (student.predict(call, 1000).out, served(student, call)):
        for head in range(2):
            expected = reference(student, call, head)
            torch.testing.assert_close(out[0, head].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_serving_is_prediction_on_all_rows(batch: int, chunk: int) -> None:
    call = call_of(LAYOUT, batch=batch)
    student = kernel(call)
    made = student.predict(call, chunk)
    torch.testing.assert_close(served(student, call), made.out, atol=1e-5, rtol=1e-5)
    assert made.log_mass is None and made.far_out is None


def test_equal_values_come_out() -> None:
    call = call_of(LAYOUT)
    value = torch.linspace(-2, 3, WIDTH).expand_as(call.value)
    out = served(kernel(call), Rows(call.query, call.index, call.key, value, SCALE, LAYOUT))
    torch.testing.assert_close(out, value, atol=1e-5, rtol=1e-5)


def test_weights_are_what_the_output_stands_for() -> None:
    call = call_of(LAYOUT)
    student = kernel(call)
    rows = some_rows(call, torch.arange(0, LAYOUT.tokens, 5))
    weights = student.weights(rows)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    made = student.predict(rows, 1000).out
    torch.testing.assert_close(weights @ call.value, made, atol=1e-5, rtol=1e-5)


def test_a_full_share_of_all_landmarks_is_exact_attention() -> None:
    call = call_of(LAYOUT)
    student = kernel(call, landmarks=16_384)
    with torch.no_grad():
        student.share.fill_(40.0)
    exact = scaled_dot_product_attention(call.query, call.key, call.value, scale=SCALE)
    torch.testing.assert_close(served(student, call), exact, atol=1e-5, rtol=1e-5)


def test_landmarks_are_the_text_and_evenly_spread_image_tokens() -> None:
    places = landmark_places(TokenLayout(3, ((10, 10),)), 20, torch.device("cpu"))
    assert places[:3].tolist() == [0, 1, 2]
    assert (places[3:] - 3).tolist() == list(range(2, 100, 5))
    none = landmark_places(TokenLayout(3, ((10, 10),)), 0, torch.device("cpu"))
    assert none.tolist() == [0, 1, 2]


def test_without_text_or_landmarks_the_kernel_is_alone() -> None:
    layout = TokenLayout(0, ((12, 12),))
    call = call_of(layout)
    student = kernel(call, landmarks=0)
    torch.testing.assert_close(
        served(student, call), student.predict(call, 1000).out, atol=1e-5, rtol=1e-5
    )
    value = torch.linspace(-2, 3, WIDTH).expand_as(call.value)
    same = Rows(call.query, call.index, call.key, value, SCALE, layout)
    torch.testing.assert_close(served(student, same), value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(student.weights(same).sum(-1), torch.ones(1, 2, layout.tokens))


def test_bfloat16_is_served_in_its_dtype() -> None:
    call = call_of(LAYOUT)
    student = kernel(call)
    exact = served(student, call)
    short = (x.bfloat16() for x in (call.query, call.key, call.value))
    out = student.serve(*short, SCALE, LAYOUT, 64).out
    assert out.dtype == torch.bfloat16
    assert float((out.float() - exact).square().sum() / exact.square().sum()) < 1e-4


def test_gradients_are_differences() -> None:
    call = call_of(LAYOUT, dtype=torch.float64)
    student = kernel(call).double()
    rows = some_rows(call, torch.arange(0, LAYOUT.tokens, 40))

    def total() -> torch.Tensor:
        return student.predict(rows, 4).out.square().sum()

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


def test_the_share_learns_at_its_own_rate() -> None:
    student = cast(KernelStudent, student_of("kernel"))
    assert [id(p) for p in student.share_parameters()] == [id(student.share)]


def test_refuses_what_has_no_layout() -> None:
    refused = student_of("kernel").refuses((1, 2, 9, 16), (1, 2, 9, 16), None)
    assert refused is not None and refused[0] is Fallback.LAYOUT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serving_memory_is_estimated(dtype: torch.dtype) -> None:
    layout = TokenLayout(32, ((64, 64),))
    call = call_of(layout, dtype=dtype)
    student = student_of("kernel", features=32)
    with HeldBytes() as held:
        student.serve(call.query, call.key, call.value, SCALE, layout, 64)
    estimate = student.serving_bytes(tuple(call.query.shape), dtype, layout, 64)
    assert 0.75 * held.peak <= estimate <= 1.25 * held.peak


@pytest.mark.parametrize("chunk", [32, 128])
def test_training_memory_is_estimated(chunk: int) -> None:
    layout = TokenLayout(32, ((64, 64),))
    call = call_of(layout)
    student = student_of("kernel", features=32)
    rows = some_rows(call, torch.arange(0, layout.tokens, 32))
    with HeldBytes() as held:
        student.predict(rows, chunk).out.square().sum().backward()
    estimate = student.training_bytes(tuple(call.query.shape), len(rows.index), chunk)
    assert 0.75 * held.peak <= estimate <= 1.25 * held.peak


def test_cost_counts_features_and_landmarks() -> None:
    options = StudentOptions("kernel", 2, WIDTH, 12, 1, 24)
    shape = (1, 2, LAYOUT.tokens, WIDTH)
    expected = 2 * 4 * LAYOUT.tokens * WIDTH * (24 + 5 + 24)
    assert KernelStudent.flops(shape, options, LAYOUT) == pytest.approx(expected)
    with pytest.raises(ValueError, match="layout"):
        KernelStudent.flops(shape, options, None)
