"""Steering a running sampler."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.responses import Response

from ...db import revisions
from .. import security, serial, steering
from ..schemas import Revision, RevisionRequest, Revisions, Run
from ..services import ServicesDep
from .answers import RunIdPath, answer
from .runs import found

router = APIRouter(prefix="/runs/{run_id}", tags=["settings"])


@router.get("/revisions", response_model=Revisions)
def list_revisions(run_id: RunIdPath, services: ServicesDep) -> Response:
    """Settings revisions and what became of them."""
    with services.store.read() as session:
        run = found(session, run_id)
        rows = revisions.of_run(session, run.id)
        return answer(Revisions(items=[serial.revision(row, run_id) for row in rows]))


@router.put(
    "/settings",
    status_code=202,
    response_model=Revision,
    dependencies=[Depends(security.may_steer)],
)
def put_settings(run_id: RunIdPath, request: RevisionRequest, services: ServicesDep) -> Response:
    """Push settings to a running sampler; it takes them up between two steps."""
    revision = steering.push(services, run_id, request.base_revision, request.settings)
    return answer(revision, status=202)


@router.post(
    "/interrupt",
    status_code=202,
    response_model=Run,
    dependencies=[Depends(security.may_steer)],
)
def interrupt(run_id: RunIdPath, services: ServicesDep) -> Response:
    """Ask ComfyUI to stop the run."""
    return answer(steering.interrupt(services, run_id), status=202)
