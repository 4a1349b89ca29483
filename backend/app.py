"""The application: routes, middleware, and what starts and stops with it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware

from ..db import migrate
from ..db.session import Store
from ..version import __version__
from . import api_document, pages, problem_handlers, security
from .api import (
    changes,
    comparison,
    distillation,
    docs,
    figures,
    health,
    images,
    ingest,
    instances,
    runs,
    schema,
    session,
    settings,
)
from .api.answers import BASE, PROBLEMS
from .comparing import Comparer
from .config import Config
from .feed import Feed
from .image_files import ImageFiles
from .mailbox import Mailboxes
from .services import Services
from .sweeper import Sweeper

log = logging.getLogger(__name__)

OPEN_ROUTES = (health.router, session.router)
READ_ROUTES = (
    schema.router,
    instances.router,
    runs.router,
    settings.router,
    images.router,
    figures.router,
    distillation.router,
    comparison.router,
    changes.router,
    docs.router,
)
STEER_ROUTES = (ingest.router,)


def create_app(config: Config) -> FastAPI:
    """Make the server's application.

    The database is opened, and brought to the newest schema, when the application starts.
    """
    store = Store(config.url, config.busy_timeout)
    files = ImageFiles(config.images_dir)
    services = Services(
        config=config,
        store=store,
        feed=Feed(),
        mailboxes=Mailboxes(),
        images=files,
        comparer=Comparer(files),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(_open, services)
        await services.feed.open(services)
        services.mailboxes.open()
        sweeper = Sweeper(services)
        sweeper.start()
        try:
            yield
        finally:
            close_streams(app)
            await sweeper.stop()
            await run_in_threadpool(store.close)

    app = FastAPI(
        title="AttnScope",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    _add_routes(app)
    problem_handlers.install(app)
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=5)
    app.add_middleware(security.Guard, config=config)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def close_streams(app: FastAPI) -> None:
    """End every open stream, so that a stopping server need not wait for its readers."""
    services: Services = app.state.services
    services.feed.close()
    services.mailboxes.close()


def _add_routes(app: FastAPI) -> None:
    api = APIRouter(prefix=BASE, responses=PROBLEMS)
    for router in OPEN_ROUTES:
        api.include_router(router)
    for router in READ_ROUTES:
        api.include_router(router, dependencies=[Depends(security.may_read)])
    for router in STEER_ROUTES:
        api.include_router(router, dependencies=[Depends(security.may_steer)])
    app.include_router(api)
    app.include_router(pages.router)


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = api_document.document(app)
    return app.openapi_schema


def _open(services: Services) -> None:
    config = services.config
    config.data_dir.mkdir(parents=True, exist_ok=True)
    migrate.upgrade(services.store)
    services.images.open()
    log.info("database %s, images in %s", services.store.url, config.images_dir)
