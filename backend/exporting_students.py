"""A run's training as the events that it came in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from ..attention.distillation import TRAINING_METRIC_NAMES
from ..db import models, students
from ..db.student_blocks import Updates
from ..db.student_models import StudentBatch, StudentEventRow
from ..wire import StudentHappened, StudentsUpdated, UpdateColumns


class _Layer:
    """A layer's updates, handed out event by event with one block in memory."""

    def __init__(self, number: int, blocks: Iterator[Updates]) -> None:
        self.number = number
        self.blocks = blocks
        self.block: Updates | None = next(blocks, None)
        self.place = 0

    def take(self, seq: int) -> Iterator[Updates]:
        """The updates that came in the event of this number."""
        while self.block is not None:
            stop = int(np.searchsorted(self.block.whole["seq"], seq, side="right"))
            if stop > self.place:
                yield self.block.cut(self.place, stop)
            self.place = stop
            if stop < len(self.block):
                return
            self.block, self.place = next(self.blocks, None), 0


class Batches:
    """Makes a run's events of updates anew, in their order."""

    def __init__(self, session: Session, run: models.Run, names: Sequence[str]) -> None:
        self.run = run
        self.names = names
        self.layers = [
            _Layer(row.layer, students.of_layer(session, row))
            for row in students.layers(session, run.id)
        ]

    def event(self, batch: StudentBatch) -> StudentsUpdated:
        """One of them. Its updates stand in the order of time, and of layers within it."""
        parts = [(layer.number, part) for layer in self.layers for part in layer.take(batch.seq)]
        at = np.concatenate([part.at for _, part in parts]) if parts else np.zeros(0)
        order = np.argsort(at, kind="stable")

        def whole(name: str) -> list[int]:
            given = [part.whole[name] for _, part in parts]
            return [int(v) for v in np.concatenate(given)[order]] if given else []

        layers = np.repeat([number for number, _ in parts], [len(part) for _, part in parts])
        metrics = {
            name: _metric(name, [part for _, part in parts], order) for name in _known(parts)
        }
        return StudentsUpdated(
            run_id=self.run.run_id,
            seq=batch.seq,
            at=batch.at,
            updates=UpdateColumns(
                layer=[self.names[int(number)] for number in layers[order]] if parts else [],
                update=whole("update"),
                step=whole("step"),
                at=[float(value) for value in at[order]],
                metrics=metrics,
            ),
            replay_limit_bytes=batch.replay_limit_bytes,
        )


def _known(parts: Sequence[tuple[int, Updates]]) -> list[str]:
    return [
        name
        for name in TRAINING_METRIC_NAMES
        if any(part.metrics[name].measured.any() for _, part in parts)
    ]


def _metric(name: str, parts: Sequence[Updates], order: Any) -> list[float | None]:
    values = np.concatenate([part.metrics[name].values for part in parts])[order]
    measured = np.concatenate([part.metrics[name].measured for part in parts])[order]
    return [
        float(value) if known else None
        for value, known in zip(values.tolist(), measured.tolist(), strict=True)
    ]


def happened(run: models.Run, row: StudentEventRow, names: Sequence[str]) -> StudentHappened:
    """Something else that happened, as it came."""
    return StudentHappened.model_validate(
        {
            "run_id": run.run_id,
            "seq": row.seq,
            "at": row.at,
            "event": row.event,
            "layer": None if row.layer is None else names[row.layer],
            "update": row.update,
            "step": row.step,
            "detail": row.detail,
        }
    )
