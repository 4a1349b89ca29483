"""Previews and finished images."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import FileResponse, Response

from ...db import images
from .. import problems, serial
from ..schemas import Images
from ..services import ServicesDep
from .answers import RunIdPath, answer
from .runs import found

router = APIRouter(tags=["images"])


@router.get("/runs/{run_id}/images", response_model=Images)
def list_images(run_id: RunIdPath, services: ServicesDep) -> Response:
    """Images of a run, in the order in which they were taken."""
    with services.store.read() as session:
        rows = images.of_run(session, found(session, run_id).id)
        return answer(Images(items=[serial.image(row) for row in rows]))


@router.get(
    "/images/{sha256}",
    response_class=FileResponse,
    responses={200: {"content": {"image/*": {}}, "description": "the image's bytes"}},
)
def one_image(
    sha256: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")], services: ServicesDep
) -> Response:
    """An image's bytes. They never change, so they may be kept for ever."""
    with services.store.read() as session:
        media_type = images.media_type(session, sha256)
    path = services.images.path(sha256)
    if media_type is None or not path.is_file():
        raise problems.not_found("image", sha256)
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return FileResponse(path, media_type=media_type, headers=headers)
