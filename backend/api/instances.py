"""ComfyUI processes, their mailboxes and what their later runs begin with."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ...db import instances
from .. import mailbox, problems, security, serial, steering
from ..schemas import Instance, Instances, InstanceSettingsAnswer, InstanceSettingsRequest
from ..services import ServicesDep
from ..streams import EventStream
from .answers import InstanceIdPath, answer

router = APIRouter(prefix="/instances", tags=["instances"])


@router.get("", response_model=Instances)
def list_instances(services: ServicesDep) -> Response:
    """Every ComfyUI process that was ever heard of, the one heard last first."""
    with services.store.read() as session:
        rows = instances.newest_first(session)
        items = [serial.instance(session, row, services.mailboxes.online) for row in rows]
    return answer(Instances(items=items))


@router.get("/{instance_id}", response_model=Instance)
def one_instance(instance_id: InstanceIdPath, services: ServicesDep) -> Response:
    """One ComfyUI process."""
    with services.store.read() as session:
        row = instances.find(session, instance_id)
        if row is None:
            raise problems.not_found("instance", instance_id)
        item = serial.instance(session, row, services.mailboxes.online)
    return answer(item)


@router.get(
    "/{instance_id}/mailbox",
    dependencies=[Depends(security.may_steer)],
    response_class=EventStream,
    status_code=200,
    responses={
        200: {
            "description": "server-sent events, each one `MailboxMessage` (wire.py)",
            "content": {
                "text/event-stream": {"schema": {"$ref": "#/components/schemas/MailboxMessage"}}
            },
        }
    },
)
async def open_mailbox(
    instance_id: InstanceIdPath, request: Request, services: ServicesDep
) -> EventStream:
    """Messages for the plugin: every open one at once, then new ones as they come."""
    return EventStream(mailbox.messages(services, instance_id), services.config.ping_every)


@router.put(
    "/{instance_id}/settings/{variant}",
    response_model=InstanceSettingsAnswer,
    dependencies=[Depends(security.may_steer)],
)
def put_instance_settings(
    instance_id: InstanceIdPath,
    variant: str,
    request: InstanceSettingsRequest,
    services: ServicesDep,
) -> Response:
    """Set what later runs of the instance begin with; null takes it back."""
    return answer(steering.set_instance_settings(services, instance_id, variant, request.settings))
