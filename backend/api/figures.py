"""Plotly figures, defined once for page, history and export."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic_core import to_json
from starlette.responses import Response

from ...attention.metrics import METRIC_NAMES
from .. import columns, figures, problems
from ..schemas import FieldProblem
from ..services import ServicesDep
from .answers import RunIdPath
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
