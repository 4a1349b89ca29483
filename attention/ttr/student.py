"""What a student is: a module that stands in for one layer's attention, and how it is taught."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..reasons import Fallback
from ..token_layout import TokenLayout


@dataclass(frozen=True, slots=True)
class StudentOptions:
    """What a layer's student is built by; a checkpoint of other options is another student.

    Attributes:
        kind: ``residual``, ``kernel`` or ``scan``.
        heads: H.
        head_dim: D, of query, key and value.
        features: F, of a head.
        window_radius: of the residual student, in tiles.
        landmarks: of the kernel student, image tokens.
    """

    kind: str
    heads: int
    head_dim: int
    features: int
    window_radius: int
    landmarks: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Some queries of a call with all its keys and values.

    Attributes:
        query: ``[B, H, S, D]``.
        index: ``[S]`` int64, place of each query in the sequence.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, D]``.
        scale: factor on q·k.
        layout: where the tokens stand; None where it isn't certain.
    """

    query: torch.Tensor
    index: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    layout: TokenLayout | None


@dataclass(frozen=True, slots=True)
class Target:
    """What the teacher makes of some queries.

    Attributes:
        out: ``[B, H, S, D]`` float32, what the model's own attention returned.
        log_mass: ``[B, H, S]`` float32, logsumexp of the scaled logits.
    """

    out: torch.Tensor
    log_mass: torch.Tensor


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a student makes of some queries.

    Attributes:
        out: ``[B, H, S, D]`` float32.
        log_mass: ``[B, H, S]`` float32, log of the denominator, comparable to a teacher's; None
            for a student without a joint normaliser.
        far_out: ``[B, H, S, D]`` float32, the far part by itself, normalised; None for a student
            without one.
        far_log_mass: ``[B, H, S]`` float32, log of the far part's mass; None with ``far_out``.
        near_out: ``[B, H, S, D]`` float32, the exact part by itself, normalised, by which the
            teacher's far part follows from its whole; None with ``far_out``.
        near_log_mass: ``[B, H, S]`` float32; None with ``far_out``.
    """

    out: torch.Tensor
    log_mass: torch.Tensor | None = None
    far_out: torch.Tensor | None = None
    far_log_mass: torch.Tensor | None = None
    near_out: torch.Tensor | None = None
    near_log_mass: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What a student makes of a whole call.

    Attributes:
        out: ``[B, H, N, D]`` in the query's dtype.
        log_mass: ``[B, H, S]`` float32 at the rows asked for; None where none were, or the
            student has no such number.
    """

    out: torch.Tensor
    log_mass: torch.Tensor | None = None


class Student(nn.Module, ABC):
    """A layer's student. Parameters are float32; serving computes in the query's dtype."""

    kind: ClassVar[str]

    def __init__(self, options: StudentOptions, generator: torch.Generator) -> None:
        """Build on the CPU.

        Args:
            options: that the module is built by.
            generator: of the first weights, on the CPU.
        """
        super().__init__()
        self.options = options

    def refuses(
        self, query_shape: Sequence[int], key_shape: Sequence[int], layout: TokenLayout | None
    ) -> tuple[Fallback, str] | None:
        """Why the student can't take such a call, with a detail for people; None if it can."""
        return None

    def start(self, rows: Rows) -> None:
        """Set first weights by a call, before the first update; nothing is differentiated."""

    @abstractmethod
    def predict(self, rows: Rows, chunk: int) -> Prediction:
        """For training and measurement: differentiable, in float32.

        Args:
            rows: float32 tensors on the parameters' device.
            chunk: bounds what is held at once, see the student.
        """

    @abstractmethod
    def serve(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        layout: TokenLayout | None,
        chunk: int,
        log_mass_rows: torch.Tensor | None = None,
    ) -> Served:
        """Attend in place of the model, without gradients and without waiting for the device.

        Args:
            query: ``[B, H, N, D]``, any floating dtype.
            key: ``[B, H, N, D]``.
            value: ``[B, H, N, D]``.
            scale: factor on q·k.
            layout: of the tokens.
            chunk: bounds what is held at once, see the student.
            log_mass_rows: ``[S]`` int64, queries whose log mass is wanted; None for none.
        """

    def weights(self, rows: Rows) -> torch.Tensor | None:
        """Attention weights ``[B, H, S, N]`` float32 that the output stands for, summing to 1;
        None for a student that has none."""
        return None

    def share_parameters(self) -> list[nn.Parameter]:
        """Scalars that weigh the student's parts, which learn at a rate of their own."""
        return []

    @abstractmethod
    def training_bytes(self, query_shape: Sequence[int], queries: int, chunk: int) -> int:
        """Working memory of an update on the device, gradients and optimizer apart.

        Args:
            query_shape: ``(B, H, N, D)`` of the call.
            queries: S of the update.
            chunk: see the student.
        """

    @abstractmethod
    def serving_bytes(
        self,
        query_shape: Sequence[int],
        dtype: torch.dtype,
        layout: TokenLayout | None,
        chunk: int,
    ) -> int:
        """Working memory of `serve` on the device, its output included."""

    @classmethod
    @abstractmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        options: StudentOptions,
        layout: TokenLayout | None,
    ) -> float:
        """Floating-point operations of `serve`, a multiply-add counted as two.

        Raises:
            ValueError: the student needs a layout, or options and shape don't fit.
        """
