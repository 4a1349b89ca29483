"""Students by their options."""

from __future__ import annotations

import torch

from .kernel import KernelStudent
from .residual import ResidualStudent
from .scan import ScanStudent
from .student import Student, StudentOptions

STUDENTS: dict[str, type[Student]] = {
    student.kind: student for student in (ResidualStudent, KernelStudent, ScanStudent)
}
"""In the order of the settings' choices."""


def build_student(options: StudentOptions, generator: torch.Generator) -> Student:
    """A student with its first weights, on the CPU.

    Args:
        options: of the student.
        generator: of the weights, on the CPU.

    Raises:
        ValueError: the kind is unknown, or the number of features is odd.
    """
    found = STUDENTS.get(options.kind)
    if found is None:
        raise ValueError(f"kind: is {options.kind!r}; allowed: {', '.join(STUDENTS)}")
    if options.features < 2 or options.features % 2:
        raise ValueError(f"features: is {options.features}; allowed: even numbers from 2")
    # A model is sampled under inference mode; its tensors could never be trained.
    with torch.inference_mode(False):
        return found(options, generator)
