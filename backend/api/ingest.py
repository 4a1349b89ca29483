"""Where plugins hand in what happened."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ...wire import Batch, IngestAnswer
from .. import body, ingest
from ..services import ServicesDep
from .answers import answer

router = APIRouter(tags=["ingest"])


@router.post(
    "/ingest",
    response_model=IngestAnswer,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "JSON, which may be packed (`Content-Encoding: gzip`)",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Batch"}}},
        }
    },
)
async def post_batch(request: Request, services: ServicesDep) -> Response:
    """Store a batch of events whole or not at all; answers the highest durable seq per run."""
    config = services.config
    data = await body.read(request, max_body=config.max_body, max_unpacked=config.max_unpacked)
    return answer(await run_in_threadpool(_store, services, data))


def _store(services: ServicesDep, data: bytes) -> IngestAnswer:
    batch = ingest.parse(data)
    return ingest.store(services, batch)


REQUEST_MODEL = Batch
