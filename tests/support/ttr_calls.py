"""Small calls that students are tried on."""

from __future__ import annotations

import torch

from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr.build import build_student
from attnscope.attention.ttr.student import Rows, Student, StudentOptions

WIDTH = 16
SCALE = WIDTH**-0.5


def student_of(kind: str, *, heads: int = 2, features: int = 12, **options: int) -> Student:
    """A student with weights as they begin, of the same seed each time."""
    window, landmarks = options.get("window_radius", 1), options.get("landmarks", 24)
    made = StudentOptions(kind, heads, WIDTH, features, window, landmarks)
    return build_student(made, torch.Generator().manual_seed(1))


def call_of(
    layout: TokenLayout,
    *,
    batch: int = 1,
    heads: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """A call of random tensors whose means are not zero, and all its queries."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, heads, layout.tokens, WIDTH)
    query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return Rows(query + 0.4, torch.arange(layout.tokens), key + 0.3, value, SCALE, layout)


def some_rows(call: Rows, index: torch.Tensor) -> Rows:
    """Some queries of a call."""
    query = call.query[:, :, index]
    return Rows(query, call.index[index], call.key, call.value, call.scale, call.layout)


def trained(student: Student, call: Rows) -> Student:
    """The student after `start` and a few steps away from there, so that no weight is special."""
    student.start(call)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return student
