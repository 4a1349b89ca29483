"""Errors as problem details (RFC 9457): one shape, a stable type, never a stack trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from .schemas import FieldProblem, Problem, Revision

MEDIA_TYPE = "application/problem+json"
LONGEST_VALUE = 120
TITLES = {
    400: "bad request",
    401: "a token is needed",
    403: "not allowed",
    404: "not found",
    405: "method not allowed",
    409: "conflict",
    413: "too large",
    415: "unsupported media type",
    421: "host name not served",
    422: "not valid",
    500: "internal error",
    503: "busy",
    507: "out of storage",
}


class ProblemError(Exception):
    """An error that is answered as a problem."""

    def __init__(
        self,
        status: int,
        type: str,
        detail: str,
        *,
        errors: Sequence[FieldProblem] = (),
        current: Revision | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.problem = Problem(
            type=type,
            title=TITLES.get(status, "error"),
            status=status,
            detail=detail,
            errors=list(errors),
            current=current,
        )
        self.headers = headers or {}


class FieldErrors(ValueError):
    """Values that were not accepted, each with its place; answered as 422."""

    def __init__(self, errors: Sequence[FieldProblem]) -> None:
        super().__init__(sentence(errors))
        self.errors = list(errors)


def not_found(what: str, name: str) -> ProblemError:
    """The problem that something named by the caller does not exist."""
    return ProblemError(404, "not-found", f"{what}: there is none with the id {name!r}.")


def invalid(errors: Sequence[FieldProblem]) -> ProblemError:
    """The problem that fields were not accepted."""
    return ProblemError(422, "validation-error", sentence(errors), errors=errors)


def sentence(errors: Sequence[FieldProblem]) -> str:
    """The first errors in words: field, value, what is allowed."""
    parts = [f"{e.field}: {shown(e.value)}; allowed: {e.allowed}" for e in errors[:3]]
    more = len(errors) - len(parts)
    return ". ".join(parts) + (f". And {more} more." if more > 0 else ".")


def shown(value: Any) -> str:
    """A value as text in a sentence."""
    return value if isinstance(value, str) else to_json(value, inf_nan_mode="strings").decode()


def shorten(value: Any) -> Any:
    """A value fit for an error: itself when small, otherwise its beginning as text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    try:
        text = value if isinstance(value, str) else to_json(value, inf_nan_mode="strings").decode()
    except ValueError:
        text = repr(type(value))
    if len(text) > LONGEST_VALUE:
        return text[:LONGEST_VALUE] + "…"
    return value if isinstance(value, (str, list, dict)) else text


def respond(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """A problem as an HTTP response."""
    return Response(
        problem.model_dump_json(exclude_none=False),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=headers,
    )
