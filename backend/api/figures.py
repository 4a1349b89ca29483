"""Plotly figures, defined once for page, history and export."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic_core import to_json
from starlette.responses import Response

from ...attention.metrics import METRIC_NAMES
from ...db import models, steps
from .. import columns, figures, problems, validation
from ..figures import schedules
from ..schemas import FieldProblem, ScheduleFigures, SchedulesRequest
from ..services import ServicesDep
from .answers import RunIdPath, answer
from .runs import found

router = APIRouter(tags=["figures"])


@router.get("/runs/{run_id}/figures/{name}", response_model=dict[str, Any])
def one_figure(
    run_id: RunIdPath,
    name: figures.FigureName,
    services: ServicesDep,
    metric: Annotated[str, Query(description="name of a metric")] = "nmse",
    data: Annotated[bool, Query(description="0 leaves the numbers out")] = True,
) -> Response:
    """A figure as plotly's JSON; `meta.bind` of each trace names the columns that it draws."""
    if metric not in METRIC_NAMES:
        allowed = ", ".join(METRIC_NAMES)
        raise problems.invalid([FieldProblem(field="metric", value=metric, allowed=allowed)])
    with services.store.read() as session:
        run = found(session, run_id)
        numbers = columns.of_run(session, run) if data else None
    figure = figures.build(name, run_id, metric)
    if numbers is not None:
        figure = figures.fill(figure, numbers)
    return Response(to_json(figure, inf_nan_mode="null"), media_type="application/json")


@router.post("/runs/{run_id}/schedules", response_model=ScheduleFigures)
def draw_schedules(
    run_id: RunIdPath, request: SchedulesRequest, services: ServicesDep
) -> Response:
    """What settings would let follow sigma over this run's steps. Nothing is changed."""
    with services.store.read() as session:
        run = found(session, run_id)
        tokens = steps.longest_key(session, run.id) or _tokens_of_latent(run)
        merged = {**run.settings, **request.settings}
        chosen = validation.settings(run.variant, merged, "settings.")
        sigmas = run.sampling["sigmas"]
        drawn = {
            schedule.name: schedules.build(schedule, chosen, sigmas, tokens)
            for schedule in schedules.SCHEDULES.get(run.variant, ())
        }
    return answer(ScheduleFigures(tokens=tokens, figures=drawn))


def _tokens_of_latent(run: models.Run) -> int:
    """Before the first step has closed: what a latent comes to at Flux's 2×2 pixels a token."""
    shape = run.sampling.get("latent_shape") or []
    return max(1, -(-shape[-2] // 2) * -(-shape[-1] // 2)) if len(shape) >= 4 else 1
