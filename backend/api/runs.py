"""Runs and their numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from sqlalchemy.orm import Session
from starlette.responses import Response

from ...db import models, runs, steps
from ...wire import RunStatus
from .. import columns, housekeeping, problems, security, serial
from ..schemas import Columns, LayerSteps, Reasons, Run, RunPatch, Runs, Steps
from ..services import ServicesDep
from .answers import RunIdPath, answer

router = APIRouter(prefix="/runs", tags=["runs"])

Sort = Literal[
    "started_at",
    "-started_at",
    "duration_ms",
    "-duration_ms",
    "nmse_worst",
    "-nmse_worst",
    "fallback_share",
    "-fallback_share",
    "status",
    "-status",
    "variant",
    "-variant",
]
StepNumber = Annotated[int | None, Query(ge=0)]


def found(session: Session, run_id: str) -> models.Run:
    """The run of an id.

    Raises:
        ProblemError: there is none (404).
    """
    row = runs.find(session, run_id)
    if row is None:
        raise problems.not_found("run", run_id)
    return row


@router.get("", response_model=Runs)
def list_runs(
    services: ServicesDep,
    status: Annotated[list[RunStatus] | None, Query()] = None,
    variant: Annotated[list[str] | None, Query()] = None,
    instance_id: str | None = None,
    q: Annotated[str | None, Query(max_length=200, description="text in label or id")] = None,
    sort: Annotated[Sort | None, Query(description="left out: running first, then newest")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """Runs, filtered, sorted and cut into pages."""
    wanted = runs.Wanted(
        status=[item.value for item in status or []],
        variant=variant or [],
        instance_id=instance_id,
        text=q,
        sort=sort,
    )
    with services.store.read() as session:
        rows, total = runs.page(session, wanted, limit, offset)
        items = serial.runs(session, rows)
    return answer(Runs(items=items, total=total, limit=limit, offset=offset))


@router.get("/{run_id}", response_model=Run)
def one_run(run_id: RunIdPath, services: ServicesDep) -> Response:
    """One run."""
    with services.store.read() as session:
        return answer(serial.run(session, found(session, run_id)))


@router.patch("/{run_id}", response_model=Run, dependencies=[Depends(security.may_steer)])
def rename_run(run_id: RunIdPath, patch: RunPatch, services: ServicesDep) -> Response:
    """Rename a run."""
    return answer(housekeeping.rename(services, run_id, patch.label))


@router.delete("/{run_id}", status_code=204, dependencies=[Depends(security.may_steer)])
def delete_run(run_id: RunIdPath, services: ServicesDep) -> Response:
    """Delete a run that has ended, with its images."""
    housekeeping.delete(services, run_id)
    return Response(status_code=204)


@router.get("/{run_id}/steps", response_model=Steps)
def list_steps(
    run_id: RunIdPath,
    services: ServicesDep,
    from_step: StepNumber = None,
    to_step: StepNumber = None,
) -> Response:
    """Per step figures over the layers."""
    with services.store.read() as session:
        run = found(session, run_id)
        rows = steps.of_run(session, run.id, from_step, to_step)
        return answer(Steps(items=[serial.step(row) for row in rows]))


@router.get("/{run_id}/layer-steps", response_model=LayerSteps)
def list_layer_steps(
    run_id: RunIdPath,
    services: ServicesDep,
    from_step: StepNumber = None,
    to_step: StepNumber = None,
    layer: Annotated[list[str] | None, Query()] = None,
) -> Response:
    """What each layer did at each step."""
    with services.store.read() as session:
        run = found(session, run_id)
        names = runs.layer_names(session, run.id)
        for name in layer or []:
            if name not in names:
                raise problems.not_found("layer", name)
        chosen = [names.index(name) for name in layer] if layer else None
        rows = steps.layer_rows(session, run.id, from_step, to_step, chosen)
        return answer(serial.layer_steps(rows, names))


@router.get("/{run_id}/fallbacks", response_model=Reasons)
def list_fallbacks(
    run_id: RunIdPath,
    services: ServicesDep,
    from_step: StepNumber = None,
    to_step: StepNumber = None,
) -> Response:
    """Gates and fallbacks with their counts."""
    with services.store.read() as session:
        run = found(session, run_id)
        names = runs.layer_names(session, run.id)
        rows = steps.reasons(session, run.id, from_step, to_step)
        return answer(serial.reasons(rows, names))


@router.get("/{run_id}/columns", response_model=Columns)
def all_columns(run_id: RunIdPath, services: ServicesDep) -> Response:
    """The whole run as typed columns, with the feed position that they include."""
    with services.store.read() as session:
        return answer(columns.of_run(session, found(session, run_id)))
