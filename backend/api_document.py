"""The HTTP API as an OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from ..version import __version__
from ..wire import Batch, MailboxMessage
from .schemas import Change, Image, Instance, Problem, Run, StepDelta
from .training_schemas import TrainingTotals

EXTRA_MODELS: tuple[Any, ...] = (
    Batch,
    MailboxMessage,
    Problem,
    Change,
    StepDelta,
    Run,
    Instance,
    Image,
    TrainingTotals,
)
"""Models that no route names as its answer, but streams and error answers carry."""

REF = "#/components/schemas/{model}"


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application, the same at every call."""
    spec = get_openapi(
        title="AttnScope",
        version=__version__,
        summary="Watch and steer approximate attention in running samplers.",
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    schemas: dict[str, Any] = spec.setdefault("components", {}).setdefault("schemas", {})
    for model in EXTRA_MODELS:
        adapter: TypeAdapter[Any] = TypeAdapter(model)
        schema = adapter.json_schema(ref_template=REF)
        for name, definition in schema.pop("$defs", {}).items():
            schemas.setdefault(name, definition)
        schemas.setdefault(schema.get("title", "MailboxMessage"), schema)
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    for operations in spec["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    spec["components"]["schemas"] = dict(sorted(schemas.items()))
    return spec
