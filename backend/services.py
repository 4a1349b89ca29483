"""What the routes work with, made once per application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from .config import Config

if TYPE_CHECKING:
    from ..db.session import Store
    from .comparing import Comparer
    from .feed import Feed
    from .image_files import ImageFiles
    from .mailbox import Mailboxes


@dataclass(frozen=True)
class Services:
    """Everything a route may need."""

    config: Config
    store: Store
    feed: Feed
    mailboxes: Mailboxes
    images: ImageFiles
    comparer: Comparer


async def of_request(connection: HTTPConnection) -> Services:
    """The services of the application that answers a request."""
    services = connection.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(of_request)]
