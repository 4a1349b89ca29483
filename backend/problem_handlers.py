"""Which error becomes which problem."""

from __future__ import annotations

import errno
import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from .body import BodyRefused
from .problems import TITLES, FieldErrors, ProblemError, invalid, respond
from .validation import field_problems

log = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    """Answer every error of the application as a problem."""

    async def on_problem(_: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return respond(error.problem, error.headers)

    async def on_refused_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, BodyRefused)
        return error.response

    async def on_field_errors(_: Request, error: Exception) -> Response:
        assert isinstance(error, FieldErrors)
        return respond(invalid(error.errors).problem)

    async def on_invalid_request(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return respond(invalid(field_problems(error.errors(), skip=("body",))).problem)

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        title = TITLES.get(error.status_code, "error")
        name = title.replace(" ", "-")
        wrapped = ProblemError(error.status_code, name, f"{error.detail}.")
        return respond(wrapped.problem, dict(error.headers or {}))

    async def on_database(request: Request, error: Exception) -> Response:
        return respond_storage(request, error)

    async def on_unknown(request: Request, error: Exception) -> Response:
        return respond_unknown(request, error)

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(BodyRefused, on_refused_body)
    app.add_exception_handler(FieldErrors, on_field_errors)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(DBAPIError, on_database)
    app.add_exception_handler(OSError, on_database)
    app.add_exception_handler(Exception, on_unknown)


def respond_storage(request: Request, error: Exception) -> Response:
    """Answer for a failure of the database or the disk: busy and full say so."""
    text = str(error).lower()
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "disk is full" in text:
        log.error("out of storage: %s", error)
        return respond(
            ProblemError(507, "out-of-storage", "The server's disk is full: free some.").problem,
            {"Retry-After": "30"},
        )
    if "locked" in text or "busy" in text or "timeout" in text:
        log.warning("database busy: %s", error)
        return respond(
            ProblemError(503, "busy", "The database is busy: try again.").problem,
            {"Retry-After": "1"},
        )
    return respond_unknown(request, error)


def respond_unknown(request: Request, error: Exception) -> Response:
    """Answer for an error that nobody foresaw; the log has what the client doesn't get."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    detail = "The server failed on this request; its log says why."
    return respond(ProblemError(500, "internal-error", detail).problem)
