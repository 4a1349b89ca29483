"""Who is asking, and what they may do."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .. import problems, security
from ..schemas import SessionRequest, SessionState
from ..services import ServicesDep
from .answers import answer

router = APIRouter(prefix="/session", tags=["session"])


@router.get("", response_model=SessionState)
def session_state(request: Request, services: ServicesDep) -> Response:
    """What the caller may do."""
    return answer(security.state(services.config, security.rights(request, services.config)))


@router.post("", response_model=SessionState)
def log_in(body: SessionRequest, request: Request, services: ServicesDep) -> Response:
    """Log a browser in: the token becomes a cookie that scripts can't read."""
    granted = security.rights_of_token(body.token, services.config)
    if not granted.read:
        raise problems.ProblemError(401, "unauthorized", "token: is not one of this server's.")
    response = answer(security.state(services.config, granted))
    security.set_cookie(response, request, granted, services.config)
    return response


@router.delete("", status_code=204)
def log_out() -> Response:
    """Log the browser out."""
    response = Response(status_code=204)
    security.clear_cookie(response)
    return response
