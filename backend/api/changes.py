"""The change feed, as JSON and as a stream."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from .. import feed, problems
from ..schemas import Changes, FieldProblem
from ..services import ServicesDep
from ..streams import EventStream
from .answers import answer

router = APIRouter(tags=["changes"])

After = Annotated[int | None, Query(ge=0, description="newest number that you have handled")]
RunFilter = Annotated[
    str | None, Query(pattern=r"^[0-9a-f]{32}$", description="only changes of this run")
]


@router.get("/changes", response_model=Changes)
def list_changes(
    services: ServicesDep,
    after: Annotated[int, Query(ge=0, description="newest number that you have handled")] = 0,
    run_id: RunFilter = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> Response:
    """What changed after a number, oldest first."""
    return answer(feed.page(services, after, run_id, limit))


@router.get(
    "/stream",
    response_class=EventStream,
    status_code=200,
    responses={
        200: {
            "description": "server-sent events: id is the seq, event the kind, data a `Change`",
            "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/Change"}}},
        }
    },
)
async def stream(
    services: ServicesDep,
    after: After = None,
    run_id: RunFilter = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventStream:
    """The feed as a stream. `Last-Event-ID` goes before `after`; with neither it begins now."""
    position = after
    if last_event_id:
        if not last_event_id.isdecimal() or len(last_event_id) > 18:
            raise problems.invalid(
                [
                    FieldProblem(
                        field="Last-Event-ID", value=last_event_id[:50], allowed="a change number"
                    )
                ]
            )
        position = int(last_event_id)
    start = await run_in_threadpool(feed.start_position, services, position)
    return EventStream(services.feed.frames(start, run_id), services.config.ping_every)
