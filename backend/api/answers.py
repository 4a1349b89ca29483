"""How routes answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Path
from pydantic import BaseModel
from starlette.responses import Response

from ..schemas import Problem

BASE = "/api/v1"
"""Path of the API."""

RunIdPath = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="id of a run")]
InstanceIdPath = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="id of an instance")]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "problem details (RFC 9457)",
        "content": {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
        },
    }
}
"""The error answer of every route, for the OpenAPI document."""

PROBLEM_MODEL = Problem


def answer(
    model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A model as JSON. Written by pydantic itself, which spells NaN and infinities out."""
    return Response(
        model.model_dump_json(),
        status_code=status,
        media_type="application/json",
        headers=dict(headers or {}),
    )
