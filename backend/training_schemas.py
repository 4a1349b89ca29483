"""What the REST API answers about the training of students; `schemas.py` says how numbers look."""

from __future__ import annotations

from pydantic import Field

from ..wire import Message
from .schemas import Number


class TrainingTotals(Message):
    """What a run's training of students comes to so far."""

    run_id: str
    updates: int
    updates_per_second: float | None = Field(description="of the newest minute at most")
    first_at: float | None
    last_at: float | None
    ready: int = Field(description="layers that are ready now")
    nonfinite: int = Field(description="measured values that were NaN or infinite")
    replay_bytes: float | None
    replay_limit_bytes: int | None
    events: dict[str, int] = Field(description="how often each kind of event happened")


class ReadyInterval(Message):
    """A time in which a layer was ready; open ends are null."""

    from_update: int
    from_step: int | None
    from_at: float
    to_update: int | None
    to_step: int | None
    to_at: float | None


class StudentLayerState(Message):
    """A layer's student."""

    layer: str
    updates: int = Field(description="in this run")
    first_update: int | None = Field(description="numbers go on over runs")
    last_update: int | None
    last_at: float | None
    nonfinite: int
    ready: bool
    intervals: list[ReadyInterval] = Field(description="when it was ready, oldest first")
    latest: dict[str, Number] = Field(description="newest measured value of each metric")


class RevisionMark(Message):
    """Where a revision of the settings stands on an axis of updates."""

    revision: int = Field(description="its number")
    step: int = Field(description="the first that ran with it")
    update: int = Field(description="the first one then of the layer that has had most")


class Distillation(Message):
    """A run's training of students."""

    seq: int = Field(description="change feed position that the answer includes")
    totals: TrainingTotals
    layers: list[StudentLayerState] = Field(description="in the model's order")
    marks: list[RevisionMark] = Field(description="revisions that were applied, oldest first")


class StudentEventItem(Message):
    """Something that happened to students besides updates."""

    seq: int
    at: float
    event: str
    layer: str | None = Field(description="null where it concerns all")
    update: int | None
    step: int | None
    detail: str


class StudentEvents(Message):
    items: list[StudentEventItem]
    more: bool


class TrainingBands(Message):
    """A metric over the layers, one item per bucket; null where no layer has a value."""

    p10: list[float | None] = Field(description="quantile over layers of their means")
    p50: list[float | None]
    p90: list[float | None]
    low: list[float | None] = Field(description="smallest value of any layer")
    high: list[float | None] = Field(description="largest")
    layers: list[int] = Field(description="layers that have a value")


class TrainingLines(Message):
    """Of each layer's bucket the smallest, largest, first and last finite value."""

    low: list[list[float | None]]
    high: list[list[float | None]]
    first: list[list[float | None]]
    last: list[list[float | None]]


class TrainingWindow(Message):
    """A metric's series between two update numbers, in buckets. Matrices have one row per item of
    ``layers`` and one column per item of ``start``; null: no finite value."""

    run_id: str
    seq: int = Field(description="change feed position that the answer includes")
    metric: str
    first_update: int = Field(description="least update number of these layers in the run")
    last_update: int = Field(description="greatest one")
    updates: int = Field(description="of these layers in the run")
    layers: list[str]
    width: int = Field(description="update numbers of a bucket")
    start: list[int] = Field(description="first update number of each bucket")
    counts: list[int] = Field(description="measured values that each bucket stands for")
    nonfinite: list[tuple[int, int, int]] = Field(
        description="row, column and count of values that were NaN or infinite"
    )
    heatmap: list[list[float | None]] | None = Field(
        description="of each bucket the value that wants attention: the largest where less is "
        "better, the smallest where more is"
    )
    bands: TrainingBands | None
    lines: TrainingLines | None
