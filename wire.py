"""The messages between plugin and server, defined once for both sides.

Up: ``POST /api/v1/ingest`` carries a `Batch` of events. Every event has ``(run_id, seq)``; seq
starts at 0 with `RunStarted` and grows by one per event of the run, so the server can tell a
repeated event from a new one and a gap from an end. Events of a run are sent in order.

Down: ``GET /api/v1/instances/{instance_id}/mailbox`` streams `MailboxMessage` objects as
server-sent events. Every message that is still open is sent again on each connection; a receiver
knows by ``id`` what it already has.

Floats that JSON has no number for travel as the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``; ``null`` means "not measured".
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, model_validator

from .attention.distillation import StudentEvent

PROTOCOL: Literal[1] = 1

Name = Annotated[str, Field(min_length=1, max_length=200)]
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="UUID, 32 hex digits")]
InstanceId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="UUID, 32 hex digits")]
Layer = Annotated[
    str,
    Field(
        pattern=r"^[a-z_]{1,32}\.\d{1,4}$",
        description="block_type.block_index",
        examples=["single.12"],
    ),
]
Count = Annotated[int, Field(ge=0, le=2**53)]
UnixTime = Annotated[float, Field(description="seconds since 1970, UTC", allow_inf_nan=False)]
Number = float | None
ReasonKind = Literal["gate", "fallback", "choice"]


class Message(BaseModel):
    """Base of all messages: unknown fields are errors, NaN and infinities are spelled out."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class RunStatus(str, Enum):
    """States of a run."""

    RUNNING = "running"
    COMPLETED = "completed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    LOST = "lost"
    """Nothing was heard of the instance for a while, and no end was reported."""


class RevisionState(str, Enum):
    """States of a settings revision."""

    PENDING = "pending"
    DELIVERED = "delivered"
    APPLIED = "applied"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"


class InstanceInfo(Message):
    """One ComfyUI process with the plugin."""

    instance_id: InstanceId
    name: Name = Field(description="host name and port, or what the user set")
    started_at: UnixTime
    plugin_version: str = ""
    comfyui_version: str = ""
    torch_version: str = ""
    python_version: str = ""
    platform: str = ""
    device: str = Field("", description="name of the sampling device", examples=["cpu"])
    device_memory_bytes: Count | None = None


class SamplingInfo(Message):
    """What is known of the sampler when a run begins."""

    sampler: str | None = None
    sigmas: list[float] = Field(
        max_length=100_001, description="the schedule; one more than steps"
    )
    seed: int | None = None
    cfg: float | None = None
    denoise: float | None = None
    latent_shape: list[int] = Field(default_factory=list, max_length=8)
    prompt_id: str | None = None
    node_id: str | None = None
    list_index: int | None = None
    recipe: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="hash of all that the sampler's inputs come from, without nodes of ours: "
        "runs that differ in their attention alone have the same; null where it isn't known",
    )


class ModelInfo(Message):
    """The sampled model."""

    name: str = Field("", description="class or file name")
    parameters: Count | None = None
    layers: list[Layer] = Field(
        default_factory=list, max_length=1000, description="in the order in which they run"
    )


class Event(Message):
    """Base of all events of a run."""

    run_id: RunId
    seq: Count
    at: UnixTime


class RunStarted(Event):
    """A sampler begins. Always the run's event number 0."""

    kind: Literal["run_started"] = "run_started"
    variant: Name
    settings: dict[str, Any] = Field(description="complete settings in force at step 0")
    instance_revision: int | None = Field(
        None, description="id of the instance-wide revision that the settings come from"
    )
    label: str = Field("", max_length=200)
    sampling: SamplingInfo
    model: ModelInfo = Field(default_factory=lambda: ModelInfo())


def _same_length(place: str, first: str, expected: int, columns: dict[str, list[Any]]) -> None:
    for name, column in columns.items():
        if len(column) != expected:
            raise ValueError(
                f"{place}.{name}: has {len(column)} items; "
                f"allowed: {expected}, as many as {place}.{first}"
            )


class LayerColumns(Message):
    """What the layers did in one step, one list item per layer."""

    layer: list[Layer] = Field(max_length=1000)
    path: list[Name] = Field(description="variant that made the output; 'mixed' if calls differ")
    calls: list[Count]
    calls_variant: list[Count]
    calls_gated: list[Count]
    calls_fallback: list[Count]
    tokens_q: list[Count]
    tokens_k: list[Count]
    metrics: dict[str, list[Number]] = Field(
        description="by metric name; metrics that nothing measured may be left out"
    )

    @model_validator(mode="after")
    def _same_length(self) -> LayerColumns:
        expected = len(self.layer)
        columns: dict[str, list[Any]] = {
            "path": self.path,
            "calls": self.calls,
            "calls_variant": self.calls_variant,
            "calls_gated": self.calls_gated,
            "calls_fallback": self.calls_fallback,
            "tokens_q": self.tokens_q,
            "tokens_k": self.tokens_k,
            **{f"metrics.{name}": column for name, column in self.metrics.items()},
        }
        _same_length("layers", "layer", expected, columns)
        if len(set(self.layer)) != expected:
            raise ValueError("layers.layer: names a layer twice; allowed: each layer once")
        return self


class ReasonCount(Message):
    """How often a gate or a fallback sent a layer's calls to exact attention in one step, or a
    choice gave them to a variant."""

    layer: Layer
    kind: ReasonKind
    reason: Name
    count: Annotated[int, Field(ge=1)]
    detail: str = Field("", max_length=500, description="for people, such as the rejected R")


class StepClosed(Event):
    """One step of the schedule is complete."""

    kind: Literal["step"] = "step"
    step: Count = Field(description="index into the schedule, from 0")
    sigma: float
    model_calls: Count
    duration_ms: float
    revision: Count = Field(
        description="number of the newest revision that was pushed and taken up; one that the "
        "variant tuned on top of it holds from its own step on"
    )
    layers: LayerColumns
    reasons: list[ReasonCount] = Field(default_factory=list, max_length=10_000)


class ImageTaken(Event):
    """A preview of a step, or a finished image of the run."""

    kind: Literal["image"] = "image"
    image_kind: Literal["preview", "final"]
    step: Count | None = None
    media_type: Literal["image/jpeg", "image/png", "image/webp"]
    width: Count
    height: Count
    data: Base64Bytes


class RevisionReported(Event):
    """What the sampler did with a pushed revision."""

    kind: Literal["revision"] = "revision"
    revision_id: int
    state: Literal["delivered", "applied", "rejected", "superseded"]
    step: Count | None = Field(None, description="first step that ran with it, where applied")
    reason: str = Field("", max_length=500)


class SettingsTuned(Event):
    """The variant has found settings for itself and goes on with them: a revision of its own."""

    kind: Literal["tuned"] = "tuned"
    step: Count = Field(description="first step that runs with them")
    revision: Count = Field(description="number of the revision that was in force")
    settings: dict[str, Any] = Field(description="complete")
    score_before: Number = Field(description="of the settings in force; lower is better")
    score_after: Number = Field(description="of these settings, on the same calls")
    detail: str = Field("", max_length=500, description="for people: what was compared, and how")


class UpdateColumns(Message):
    """Updates of students, one list item per update, in the order in which they were made."""

    layer: list[Layer] = Field(max_length=20_000)
    update: list[Count] = Field(description="number of the layer's update, from 1, over all runs")
    step: list[Count] = Field(description="of the run's schedule in which it was made")
    at: list[UnixTime]
    metrics: dict[str, list[Number]] = Field(
        description="by name, see attention/distillation.py; null: not measured at this update"
    )

    @model_validator(mode="after")
    def _same_length(self) -> UpdateColumns:
        columns: dict[str, list[Any]] = {
            "update": self.update,
            "step": self.step,
            "at": self.at,
            **{f"metrics.{name}": column for name, column in self.metrics.items()},
        }
        _same_length("updates", "layer", len(self.layer), columns)
        return self


class StudentsUpdated(Event):
    """Updates of students since the last such event."""

    kind: Literal["students_updated"] = "students_updated"
    updates: UpdateColumns
    replay_limit_bytes: Count | None = None


class StudentHappened(Event):
    """Something else that happened to students: readiness, want of memory, a checkpoint."""

    kind: Literal["student_event"] = "student_event"
    event: StudentEvent
    layer: Layer | None = Field(None, description="null where it concerns all")
    update: Count | None = Field(None, description="updates that the layer has had")
    step: Count | None = None
    detail: str = Field("", max_length=1000, description="for people: path, error, sizes")


class RunEnded(Event):
    """The sampler has returned or raised."""

    kind: Literal["run_ended"] = "run_ended"
    status: Literal["completed", "interrupted", "failed"]
    error: str = Field("", max_length=2000)
    duration_ms: float


class EventsLost(Event):
    """Events that the plugin had to drop because its spool was full."""

    kind: Literal["events_lost"] = "events_lost"
    count: Annotated[int, Field(ge=1)]
    reason: str = Field("", max_length=500)


AnyEvent = Annotated[
    RunStarted
    | StepClosed
    | ImageTaken
    | RevisionReported
    | SettingsTuned
    | StudentsUpdated
    | StudentHappened
    | RunEnded
    | EventsLost,
    Field(discriminator="kind"),
]


class Batch(Message):
    """What one request of the plugin carries. It is stored whole or not at all."""

    protocol: Literal[1] = PROTOCOL
    instance: InstanceInfo
    events: list[AnyEvent] = Field(default_factory=list, max_length=2000)


class IngestAnswer(Message):
    """Highest durable seq of every run in the batch."""

    durable: dict[str, int]


class RevisionPushed(Message):
    """New settings for a running sampler, complete."""

    kind: Literal["revision"] = "revision"
    id: int
    run_id: RunId
    number: Count
    variant: Name
    settings: dict[str, Any]


class InstanceSettings(Message):
    """Settings that later runs of this instance begin with; null takes them back."""

    kind: Literal["instance_settings"] = "instance_settings"
    id: int
    variant: Name
    settings: dict[str, Any] | None


class InterruptRequested(Message):
    """The user asked to stop a run."""

    kind: Literal["interrupt"] = "interrupt"
    id: int
    run_id: RunId


MailboxMessage = Annotated[
    RevisionPushed | InstanceSettings | InterruptRequested, Field(discriminator="kind")
]
