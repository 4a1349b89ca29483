"""Rows of the database as the models of the API: the only place that shapes answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from sqlalchemy.orm import Session

from ..attention.metrics import METRIC_NAMES
from ..db import instances as instance_rows
from ..db import models, numbers
from ..db import runs as run_rows
from ..db.models import LAYER_STEP_FIELDS
from ..wire import ModelInfo, ReasonKind, RevisionState, RunStatus, SamplingInfo
from .schemas import (
    Image,
    Instance,
    LayerStep,
    LayerSteps,
    ReasonRow,
    Reasons,
    Revision,
    Run,
    Step,
    StepDelta,
)

FIRST_METRIC = len(LAYER_STEP_FIELDS)
NAN_METRICS = LAYER_STEP_FIELDS.index("nan_metrics")
STEP_NAMES: tuple[str, ...] = tuple(Step.model_fields)


def instance(session: Session, row: models.Instance, online: Collection[str]) -> Instance:
    """A ComfyUI process as the API shows it."""
    names = Instance.model_fields.keys() - {"online", "running", "settings"}
    settings = {
        item.variant: item.settings
        for item in instance_rows.current_settings(session, row.instance_id)
        if item.settings is not None
    }
    return Instance(
        **{name: getattr(row, name) for name in names},
        online=row.instance_id in online,
        running=run_rows.running_of(session, row.instance_id),
        settings=settings,
    )


def run(session: Session, row: models.Run) -> Run:
    """A run as the API shows it."""
    return _run(row, run_rows.layer_names(session, row.id))


def runs(session: Session, rows: Sequence[models.Run]) -> list[Run]:
    """Runs as the API shows them."""
    layers = run_rows.layer_names_of(session, [row.id for row in rows])
    return [_run(row, layers[row.id]) for row in rows]


def _run(row: models.Run, layers: list[str]) -> Run:
    known = numbers.restored(row, ("nmse_worst", "attn_ms", "duration_ms"))
    so_far = (row.last_event_at - row.started_at) * 1000.0
    ended = row.ended_at is not None
    median = row.nmse_median_sum / row.nmse_median_count if row.nmse_median_count else None
    return Run(
        run_id=row.run_id,
        instance_id=row.instance_id,
        label=row.label,
        status=RunStatus(row.status),
        error=row.error,
        variant=row.variant,
        settings=row.settings,
        revision=row.revision,
        applied_revision=row.applied_revision,
        sampling=SamplingInfo.model_validate(row.sampling),
        model=ModelInfo.model_validate(row.model),
        layers=layers,
        started_at=row.started_at,
        ended_at=row.ended_at,
        last_event_at=row.last_event_at,
        duration_ms=known["duration_ms"] if ended else max(so_far, 0.0),
        steps_total=row.steps_total,
        steps_done=row.steps_done,
        last_step=row.last_step,
        nmse_median=median,
        nmse_worst=known["nmse_worst"],
        worst_layer=row.worst_layer,
        fallback_share=row.fallback_share,
        gated_share=row.calls_gated / row.calls if row.calls else None,
        attn_ms=known["attn_ms"],
        nonfinite=row.nonfinite,
        events_lost=row.events_lost,
        preview=row.preview,
        final=row.final,
    )


def step(row: models.Step) -> Step:
    """A step as the API shows it."""
    return Step.model_construct(**numbers.restored(row, STEP_NAMES))


def metric_values(row: Sequence[Any]) -> Sequence[float | None]:
    """Metrics of a ``layer_steps`` row, in the order of ``METRIC_NAMES``, NaN put back."""
    values: Sequence[float | None] = row[FIRST_METRIC:]
    restored: Sequence[float | None] = numbers.with_nan(values, METRIC_NAMES, row[NAN_METRICS])
    return restored


def layer_steps(rows: Sequence[Sequence[Any]], names: Sequence[str]) -> LayerSteps:
    """Rows of ``layer_steps`` as the API shows them."""
    items = []
    for row in rows:
        _, number, layer, path, calls, variant, gated, fallback, tokens_q, tokens_k = row[:10]
        items.append(
            LayerStep.model_construct(
                step=number,
                layer=names[layer],
                path=path,
                calls=calls,
                calls_variant=variant,
                calls_gated=gated,
                calls_fallback=fallback,
                tokens_q=tokens_q,
                tokens_k=tokens_k,
                metrics=dict(zip(METRIC_NAMES, metric_values(row), strict=True)),
            )
        )
    return LayerSteps.model_construct(items=items)


def reason_rows(rows: Sequence[models.Reason], names: Sequence[str]) -> list[ReasonRow]:
    """Gates, fallbacks and choices as the API shows them."""
    return [
        ReasonRow.model_construct(
            step=row.step,
            layer=names[row.layer],
            kind=cast(ReasonKind, row.kind),
            reason=row.reason,
            count=row.count,
            detail=row.detail,
        )
        for row in rows
    ]


def reasons(rows: Sequence[models.Reason], names: Sequence[str]) -> Reasons:
    """Gates, fallbacks and choices with their sums."""
    totals: dict[str, int] = {}
    for row in rows:
        totals[row.reason] = totals.get(row.reason, 0) + row.count
    return Reasons.model_construct(items=reason_rows(rows, names), totals=totals)


def step_delta(
    run_id: str,
    row: models.Step,
    layer_rows: Sequence[Sequence[Any]],
    why: Sequence[models.Reason],
    names: Sequence[str],
) -> StepDelta:
    """What one closed step adds to a run's columns; metrics that nothing measured are left out."""
    values = [metric_values(item) for item in layer_rows]
    metrics = {
        name: [item[index] for item in values]
        for index, name in enumerate(METRIC_NAMES)
        if any(item[index] is not None for item in values)
    }
    return StepDelta.model_construct(
        run_id=run_id,
        step=step(row),
        layers=[names[item[2]] for item in layer_rows],
        paths=[item[3] for item in layer_rows],
        metrics=metrics,
        reasons=reason_rows(why, names),
    )


def revision(row: models.Revision, run_id: str) -> Revision:
    """A settings revision as the API shows it."""
    return Revision(
        id=row.id,
        run_id=run_id,
        number=row.number,
        base=row.base,
        variant=row.variant,
        settings=row.settings,
        changes={name: (pair[0], pair[1]) for name, pair in row.changes.items()},
        state=RevisionState(row.state),
        reason=row.reason,
        requested_at=row.requested_at,
        delivered_at=row.delivered_at,
        settled_at=row.settled_at,
        applied_step=row.applied_step,
        instance_revision=row.instance_revision,
        tuned=row.tuned,
    )


def image(row: models.Image) -> Image:
    """An image as the API shows it."""
    return Image.model_validate({name: getattr(row, name) for name in Image.model_fields})
