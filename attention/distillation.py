"""What is told of a student's training, defined once: metrics of an update and events.

The trainer's records, the wire, the database's columns, the figures and the page's choices follow
from ``TRAINING_METRICS`` and `StudentEvent`. The module imports neither torch nor ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from .metrics import Direction, Fold, Metric

TRAINING_METRICS: tuple[Metric, ...] = (
    Metric(
        "loss",
        "Loss",
        "What the update lowers: Huber and cosine distance per token and head, and the far part.",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "loss_ema",
        "Loss, averaged",
        "Moving average of the loss.",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "nmse",
        "NMSE",
        "Σ (student - teacher)² / Σ teacher² on held-out queries.",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "nmse_ema",
        "NMSE, averaged",
        "Moving average of the held-out NMSE, by which a layer becomes ready.",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "cosine",
        "Cosine",
        "Cosine of student and teacher, mean over held-out queries and heads.",
        direction=Direction.HIGHER,
    ),
    Metric("norm_ratio", "Norm ratio", "Norm of the student's output over the teacher's."),
    Metric(
        "mean_ratio",
        "Mean ratio",
        "Mean absolute value of the student's output over the teacher's.",
    ),
    Metric(
        "std_ratio", "Std ratio", "Standard deviation of the student's output over the teacher's."
    ),
    Metric(
        "error_p95",
        "Error, 95th percentile",
        "Of the absolute errors, relative to the teacher's root mean square.",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "error_p99",
        "Error, 99th percentile",
        "Of the absolute errors, relative to the teacher's root mean square.",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "attention_kl",
        "Attention KL",
        "Kullback-Leibler divergence of the student's attention weights from the teacher's, on a "
        "few held-out queries; empty for a student that has no weights.",
        unit="nat",
        direction=Direction.LOWER,
        log=True,
    ),
    Metric(
        "topk_overlap",
        "Top-k overlap",
        "Share of the 16 keys with the teacher's largest weights that are among the student's.",
        direction=Direction.HIGHER,
    ),
    Metric(
        "log_mass_bias",
        "Log-mass bias",
        "Mean of log(student's denominator) - log(exact denominator) on held-out queries; empty "
        "for a student without a joint normaliser.",
    ),
    Metric("gradient_norm", "Gradient norm", "Before it is clipped.", log=True),
    Metric("ready", "Ready", "Whether the layer's student may serve.", fold=Fold.MIN),
    Metric("seconds", "Time", "Of the update.", unit="s", direction=Direction.LOWER),
    Metric(
        "held_bytes",
        "Replay of the layer",
        "Host memory that earlier calls of the layer hold.",
        unit="B",
    ),
    Metric(
        "replay_bytes",
        "Replay of all layers",
        "Host memory that earlier calls of all layers hold.",
        unit="B",
    ),
)
"""In the order of the table's columns. Held-out ones are measured at every ``progress_every``-th
update and empty between."""

TRAINING_METRIC_NAMES: tuple[str, ...] = tuple(metric.name for metric in TRAINING_METRICS)


class StudentEvent(str, Enum):
    """What can happen to a layer's student besides an update."""

    READY = "ready"
    NOT_READY = "not_ready"
    COMPLETE = "complete"
    OUT_OF_MEMORY = "out_of_memory"
    TRAINING_OFF = "training_off"
    TEACHER_NOT_FINITE = "teacher_not_finite"
    UPDATE_FAILED = "update_failed"
    CHECKPOINT_LOADED = "checkpoint_loaded"
    CHECKPOINT_SAVED = "checkpoint_saved"
    CHECKPOINT_FAILED = "checkpoint_failed"
    RECOVERED = "recovered"


STUDENT_EVENT_DESCRIPTIONS: dict[str, str] = {
    StudentEvent.READY.value: "The held-out error has come down to the threshold.",
    StudentEvent.NOT_READY.value: "The held-out error has risen above the threshold again.",
    StudentEvent.COMPLETE.value: "The layer has had all of its updates.",
    StudentEvent.OUT_OF_MEMORY.value: "A smaller chunk is used for this layer from now on.",
    StudentEvent.TRAINING_OFF.value: (
        "Training is off for the rest of the run; the model's own attention goes on."
    ),
    StudentEvent.TEACHER_NOT_FINITE.value: (
        "The model's own attention held NaN or infinity; nothing was learnt from it."
    ),
    StudentEvent.UPDATE_FAILED.value: "An update went wrong; the student is as it was before.",
    StudentEvent.CHECKPOINT_LOADED.value: "Students were read from the checkpoint.",
    StudentEvent.CHECKPOINT_SAVED.value: "Students were written to the checkpoint.",
    StudentEvent.CHECKPOINT_FAILED.value: "The checkpoint could not be read or written.",
    StudentEvent.RECOVERED.value: (
        "The students' memory was gone and was built anew from settings and checkpoint."
    ),
}


@dataclass(frozen=True, slots=True)
class Update:
    """One update of a layer's student.

    Attributes:
        layer: name of the block.
        update: number of the layer's update, from 1, over all runs.
        step: of the run's schedule.
        at: Unix time.
        metrics: of ``TRAINING_METRICS``, those that were measured.
    """

    layer: str
    update: int
    step: int
    at: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Occurrence:
    """Something else that happened to students.

    Attributes:
        event: what.
        layer: name of the block; None where it concerns all.
        update: updates that the layer has had.
        step: of the run's schedule; None before the first.
        detail: for people: path, error, sizes.
    """

    event: StudentEvent
    layer: str | None = None
    update: int | None = None
    step: int | None = None
    detail: str = ""


class Listener(Protocol):
    """Is told of the training, on the sampler's thread; must neither raise nor take long."""

    def updated(self, updates: Sequence[Update], replay_limit_bytes: int) -> None:
        """Updates in the order in which they were made."""

    def happened(self, occurrence: Occurrence) -> None:
        """Something else."""
