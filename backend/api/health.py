"""Whether the server is there."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ...db import changes
from ...version import __version__
from ..schemas import Health
from ..services import ServicesDep
from .answers import answer

router = APIRouter(tags=["health"])


@router.get("/health", response_model=Health)
def health(services: ServicesDep) -> Response:
    """Version and newest change number."""
    with services.store.read() as session:
        latest = changes.latest_seq(session)
    return answer(Health(status="ok", version=__version__, latest_seq=latest))
