"""What the REST API answers and takes, defined once; the page's types are generated from it.

Messages from and to the plugin are in ``wire.py``. Non-finite floats are the strings ``"NaN"``,
``"Infinity"`` and ``"-Infinity"``; ``null`` means "not measured".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from ..wire import (
    InstanceInfo,
    Message,
    ModelInfo,
    ReasonKind,
    RevisionState,
    RunStatus,
    SamplingInfo,
)

Number = Annotated[
    float | None,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number"},
                {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]},
                {"type": "null"},
            ]
        }
    ),
]


class Problem(Message):
    """An error, after RFC 9457 (``application/problem+json``)."""

    type: str = Field(description="stable name of the error", examples=["stale-revision"])
    title: str
    status: int
    detail: str = Field(description="names the field, the value and what is allowed")
    errors: list[FieldProblem] = Field(default_factory=list)
    current: Revision | None = Field(None, description="with stale-revision: the newest revision")


class FieldProblem(Message):
    """One field that was not accepted."""

    field: str = Field(examples=["settings.P", "events.3.layers.metrics.nmse"])
    value: Any = Field(None, description="the value, shortened")
    allowed: str


class Health(Message):
    status: Literal["ok"]
    version: str
    latest_seq: int


class SettingField(Message):
    """One setting as the form and the node show it."""

    name: str
    title: str
    type: Literal["boolean", "integer", "number", "string"]
    default: Any
    group: str
    help: str
    unit: str
    live: bool
    advanced: bool
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    step: float | None = None
    max_length: int | None = Field(None, description="characters of a text")
    choices: list[str] | None = None


class SettingGroup(Message):
    name: str
    title: str


class ScheduleInfo(Message):
    """Something that a variant lets follow sigma."""

    name: str
    title: str
    unit: str


class VariantSchema(Message):
    """A variant and its settings."""

    name: str
    title: str
    help: str
    fields: list[SettingField]
    schedules: list[ScheduleInfo] = Field(description="what its settings let follow sigma")
    json_schema: dict[str, Any]


class VariantSchemas(Message):
    groups: list[SettingGroup] = Field(description="in the order of the form")
    variants: list[VariantSchema]


class MetricInfo(Message):
    name: str
    title: str
    help: str
    unit: str
    direction: Literal["lower", "higher", "neutral"]
    log: bool
    names: dict[str, str] = Field(
        default_factory=dict,
        description="what each value stands for, where the metric is a code; empty for numbers",
    )


class MetricInfos(Message):
    metrics: list[MetricInfo]
    reasons: dict[str, str] = Field(description="prose for each gate and fallback name")
    training: list[MetricInfo] = Field(description="metrics of a student's update")
    student_events: dict[str, str] = Field(description="prose for each kind of student event")


class Instance(InstanceInfo):
    last_seen_at: float
    online: bool = Field(description="its mailbox is connected now")
    running: list[str] = Field(description="ids of its running runs")
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="per variant, the settings its later runs begin with"
    )


class Instances(Message):
    items: list[Instance]


class Run(Message):
    """A run with what the list of runs shows."""

    run_id: str
    instance_id: str
    label: str
    status: RunStatus
    error: str
    variant: str
    settings: dict[str, Any] = Field(description="settings in force now, or at the end")
    revision: int = Field(description="number of the newest revision, applied or not")
    applied_revision: int = Field(description="number of the revision in force")
    sampling: SamplingInfo
    model: ModelInfo
    layers: list[str] = Field(description="layers seen or announced, in the model's order")
    started_at: float
    ended_at: float | None
    last_event_at: float
    duration_ms: float | None = Field(description="so far, for a running run")
    steps_total: int
    steps_done: int
    last_step: int | None
    nmse_median: Number = Field(description="median over layers, mean over steps that have one")
    nmse_worst: Number
    worst_layer: str | None
    fallback_share: Number = Field(description="fallbacks over calls")
    gated_share: Number = Field(description="gated calls over calls")
    attn_ms: Number = Field(description="sum over the run")
    nonfinite: int = Field(description="values that were NaN or infinite, so far")
    events_lost: int
    preview: str | None = Field(description="hash of the newest preview image")
    final: str | None = Field(description="hash of the finished image")


class Runs(Message):
    items: list[Run]
    total: int
    limit: int
    offset: int


class Step(Message):
    """One closed step with figures over its layers."""

    step: int
    sigma: float
    closed_at: float
    model_calls: int
    duration_ms: float
    revision: int
    nmse_median: Number
    nmse_worst: Number
    worst_layer: str | None
    cosine_median: Number
    cosine_worst: Number
    calls: int
    fallback_share: Number
    gated_share: Number
    attn_ms: Number
    qk_std_median: Number
    qk_p01_min: Number
    qk_p99_max: Number
    denom_min: Number
    nonfinite: int


class Steps(Message):
    items: list[Step]


class LayerStep(Message):
    """One layer at one step."""

    step: int
    layer: str
    path: str
    calls: int
    calls_variant: int
    calls_gated: int
    calls_fallback: int
    tokens_q: int
    tokens_k: int
    metrics: dict[str, Number]


class LayerSteps(Message):
    items: list[LayerStep]


class ReasonRow(Message):
    step: int
    layer: str
    kind: ReasonKind
    reason: str
    count: int
    detail: str


class Reasons(Message):
    items: list[ReasonRow]
    totals: dict[str, int] = Field(description="calls per reason over the answer")


class Columns(Message):
    """A run as typed columns; what a figure's ``meta.bind`` names refers to this object.

    ``layer_steps[metric]`` is a matrix, one row per item of ``layers``, one column per step.
    """

    run_id: str
    seq: int = Field(description="change feed position that the answer includes")
    layers: list[str]
    steps: dict[str, list[Any]] = Field(description="columns of Step by name, in step order")
    layer_steps: dict[str, list[list[Number]]]
    paths: list[list[str | None]] = Field(description="matrix like layer_steps: the path taken")
    reasons: dict[str, list[int]] = Field(
        description="calls per step by 'gate.<reason>' and 'fallback.<reason>', in step order; "
        "reasons that never occurred are left out"
    )


class StepDelta(Message):
    """What one closed step adds to `Columns`."""

    run_id: str
    step: Step
    layers: list[str]
    paths: list[str]
    metrics: dict[str, list[Number]] = Field(description="per metric, one value per layer")
    reasons: list[ReasonRow]


class Revision(Message):
    """One complete set of settings and what became of it."""

    id: int
    run_id: str
    number: int = Field(description="within the run, from 0: the settings that it began with")
    base: int | None = Field(description="number of the revision that it was made from")
    variant: str
    settings: dict[str, Any]
    changes: dict[str, tuple[Any, Any]] = Field(description="setting: (before, after)")
    state: RevisionState
    reason: str
    requested_at: float
    delivered_at: float | None
    settled_at: float | None
    applied_step: int | None
    instance_revision: int | None
    tuned: bool = Field(
        False, description="whether the variant found them itself; reason says how it judged"
    )


class Revisions(Message):
    items: list[Revision]


class RevisionRequest(Message):
    """New settings for a running run."""

    base_revision: int = Field(ge=0, description="number of the newest revision that you saw")
    settings: dict[str, Any] = Field(
        description="settings to change; those left out keep their value of the base revision"
    )


class SchedulesRequest(Message):
    """Settings whose schedules are to be drawn. Nothing is changed."""

    settings: dict[str, Any] = Field(
        description="settings that differ from those in force; the others keep their value"
    )


class ScheduleFigures(Message):
    """A plotly figure for each schedule, over the run's steps."""

    tokens: int = Field(description="in the sequence; what a window over everything stands for")
    figures: dict[str, dict[str, Any]] = Field(description="by the schedule's name")


class InstanceSettingsRequest(Message):
    """Settings that later runs of the instance begin with."""

    settings: dict[str, Any] | None = Field(description="null takes them back")


class InstanceSettingsAnswer(Message):
    id: int
    variant: str
    settings: dict[str, Any] | None


class RunPatch(Message):
    label: str = Field(max_length=200)


class Image(Message):
    sha256: str
    kind: Literal["preview", "final"]
    step: int | None
    media_type: str
    width: int
    height: int
    bytes: int
    at: float


class Images(Message):
    items: list[Image]


class ComparedRun(Message):
    """A run as a comparison shows it."""

    run_id: str
    label: str
    variant: str
    status: RunStatus
    started_at: float
    device: str = Field(description="that it was sampled on; empty where it isn't known")
    model: ModelInfo
    attn_ms: Number = Field(description="time in attention, summed over the run")
    duration_ms: Number = Field(description="of the sampler; null while it runs")
    finals: list[Image] = Field(description="finished images, in the order of the batch")


class ConditionDifference(Message):
    """A condition in which two runs differ."""

    name: str = Field(examples=["seed"])
    title: str
    run: str = Field(description="the run's value, shortened")
    baseline: str


class Match(Message):
    """Whether two runs differ in their attention alone."""

    comparable: bool
    differs: list[ConditionDifference]
    unknown: list[str] = Field(
        description="conditions that one of the runs doesn't tell, so that nothing was compared"
    )


class BaselineCandidate(Message):
    run: ComparedRun
    match: Match


class Baseline(Message):
    """Exact runs that a run can be compared with."""

    run_id: str
    candidates: list[BaselineCandidate] = Field(
        description="comparable ones: those known to be of the same prompt first, then newest"
    )
    recommended: str | None = Field(
        description="id of the first candidate with a finished image, else of the first"
    )
    reason: Literal["none_exact", "none_comparable", "conditions_unknown"] | None = Field(
        description="why there is no candidate"
    )
    detail: str = Field(description="the reason in words, with what to do; empty without one")
    nearest: BaselineCandidate | None = Field(
        description="where none is comparable: the exact run with the fewest differences"
    )


class Ratio(Message):
    """A time of a run beside its baseline's."""

    run: Number
    baseline: Number
    ratio: Number = Field(description="run over baseline: below 1 is faster")


class ErrorMap(Message):
    """Where two images differ. A pixel's value is the largest error of its channels."""

    url: str = Field(description="PNG; the query's scale may be another one of scales")
    scale: int = Field(description="error, of 255, that the last colour stands for")
    scales: list[int]
    colors: list[str] = Field(description="from no error to the scale's end, evenly spaced")


class ImagePair(Message):
    """Two finished images beside each other."""

    index: int = Field(description="place in the batch")
    width: int
    height: int
    run: Image
    baseline: Image
    run_url: str
    baseline_url: str
    lossless: bool = Field(
        description="whether both are stored as they came; false: the figures include the "
        "losses of JPEG"
    )
    identical: bool = Field(description="no pixel differs")
    psnr: Number = Field(description="dB; Infinity for identical images")
    ssim: Number = Field(description="mean; null where a side is below 11 pixels")
    mae: Number = Field(description="mean absolute error, of 255")
    max_error: int = Field(description="of 255")
    error_map: ErrorMap


class Comparison(Message):
    """A run against another one."""

    run: ComparedRun
    baseline: ComparedRun
    match: Match
    images: list[ImagePair]
    unpaired: int = Field(description="images of either run that the other has no partner for")
    attn_ms: Ratio
    duration_ms: Ratio
    same_device: bool = Field(description="whether the times may be compared at all")


class Change(Message):
    """One item of the change feed. ``data`` is by kind: instance: Instance, run: Run,
    step: StepDelta, revision: Revision, image: Image with run_id, training: TrainingTotals,
    run_deleted: {run_id}."""

    seq: int
    kind: Literal["instance", "run", "step", "revision", "image", "training", "run_deleted"]
    run_id: str | None
    data: dict[str, Any]


class Changes(Message):
    items: list[Change]
    latest_seq: int
    more: bool


class SessionRequest(Message):
    token: str = Field(max_length=500)


class SessionState(Message):
    required: bool = Field(description="whether this server wants a token at all")
    may_read: bool
    may_steer: bool


Problem.model_rebuild()
