"""Training of students: what it comes to, its series, its events."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.responses import Response

from .. import distillation, problems
from ..schemas import FieldProblem
from ..services import ServicesDep
from ..training_schemas import Distillation, StudentEvents, TrainingWindow
from .answers import RunIdPath, answer
from .runs import found

router = APIRouter(prefix="/runs/{run_id}/distillation", tags=["distillation"])

Part = Literal["heatmap", "bands", "lines"]
UpdateNumber = Annotated[int | None, Query(ge=0, le=2**53)]
Width = Annotated[
    int | None,
    Query(ge=1, le=2**40, description="of a bucket: a power of two; goes before points"),
]


@router.get("", response_model=Distillation)
def one_training(run_id: RunIdPath, services: ServicesDep) -> Response:
    """A run's training: totals, and each layer's newest numbers and readiness."""
    with services.store.read() as session:
        return answer(distillation.summary(session, found(session, run_id)))


@router.get("/events", response_model=StudentEvents)
def list_events(
    run_id: RunIdPath,
    services: ServicesDep,
    after: Annotated[int, Query(ge=-1, description="newest seq that you have")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> Response:
    """What happened to students besides updates, oldest first."""
    with services.store.read() as session:
        return answer(distillation.events(session, found(session, run_id), after, limit))


@router.get("/series", response_model=TrainingWindow)
def one_window(
    run_id: RunIdPath,
    services: ServicesDep,
    metric: Annotated[str, Query(max_length=64)] = "nmse_ema",
    part: Annotated[list[Part] | None, Query(description="all if left out")] = None,
    layer: Annotated[list[str] | None, Query(description="all trained ones if left out")] = None,
    from_update: UpdateNumber = None,
    to_update: UpdateNumber = None,
    points: Annotated[
        int,
        Query(
            ge=distillation.LEAST_POINTS, le=distillation.MOST_POINTS, description="most buckets"
        ),
    ] = 1000,
    width: Width = None,
) -> Response:
    """A metric of the updates between two numbers, in buckets that lose no spike."""
    chosen = distillation.metric_of(metric)
    if width is not None and width & (width - 1):
        raise problems.invalid(
            [FieldProblem(field="width", value=width, allowed="a power of two")]
        )
    if from_update is not None and to_update is not None and to_update < from_update:
        allowed = f"at least from_update, {from_update}"
        raise problems.invalid([FieldProblem(field="to_update", value=to_update, allowed=allowed)])
    with services.store.read() as session:
        made = distillation.window(
            session,
            found(session, run_id),
            chosen,
            part or ("heatmap", "bands", "lines"),
            layers=layer or (),
            first=from_update,
            last=to_update,
            points=points,
            width=width,
        )
    return Response(distillation.as_json(made), media_type="application/json")
