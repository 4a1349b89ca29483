"""A run's baseline, and two runs against each other."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from ...db import images
from .. import baselines, pictures, problems
from ..schemas import Baseline, Comparison, FieldProblem
from ..services import ServicesDep
from .answers import BASE, RunIdPath, answer
from .runs import found

router = APIRouter(tags=["comparison"])

RUN_ID = r"^[0-9a-f]{32}$"
SHA256 = r"^[0-9a-f]{64}$"


@router.get("/runs/{run_id}/baseline", response_model=Baseline)
def find_baseline(run_id: RunIdPath, services: ServicesDep) -> Response:
    """Completed exact runs that differ from this run in their attention alone."""
    with services.store.read() as session:
        return answer(baselines.find(session, found(session, run_id)))


@router.get("/runs/{run_id}/comparison", response_model=Comparison)
def compare_runs(
    run_id: RunIdPath,
    services: ServicesDep,
    baseline: Annotated[str, Query(alias="with", pattern=RUN_ID, description="id of a run")],
) -> Response:
    """This run against another one: finished images in pairs, and times."""
    with services.store.read() as session:
        one, other = found(session, run_id), found(session, baseline)
        result = baselines.side_by_side(session, one, other)
    # The figures take time, and the database is not to be held for that.
    figures = baselines.pairs(services.comparer, result.run, result.baseline, BASE)
    return answer(result.model_copy(update={"images": figures}))


@router.get(
    "/images/{sha256}/error-map",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}, "description": "the map"}},
)
def error_map(
    sha256: Annotated[str, Path(pattern=SHA256)],
    services: ServicesDep,
    other: Annotated[str, Query(alias="with", pattern=SHA256, description="hash of an image")],
    scale: Annotated[int, Query(description="error, of 255, of the last colour")] = 64,
) -> Response:
    """Where two images differ, as PNG. It never changes, so it may be kept for ever."""
    if scale not in pictures.SCALES:
        allowed = ", ".join(map(str, pictures.SCALES))
        raise problems.invalid([FieldProblem(field="scale", value=scale, allowed=allowed)])
    with services.store.read() as session:
        for name in (sha256, other):
            if images.media_type(session, name) is None:
                raise problems.not_found("image", name)
    data = services.comparer.error_map(sha256, other, scale)
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(data, media_type="image/png", headers=headers)
