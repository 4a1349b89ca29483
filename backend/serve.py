"""The server as a process: uvicorn, with streams that do not hold up its end."""

from __future__ import annotations

from types import FrameType

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError

from ..db import migrate
from ..db.session import Store
from .app import close_streams, create_app
from .config import Config, ConfigError

STOP_SECONDS = 2
HEADER_BYTES = 64 * 1024


class Server(uvicorn.Server):
    """uvicorn's server; a signal ends the open streams first.

    uvicorn waits for its connections before it tells the application that it stops, and a stream
    never ends by itself.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal to stop."""
        close_streams(self._app)
        super().handle_exit(sig, frame)


def _prepare(config: Config) -> None:
    """Open and migrate the database once, so that what is wrong with it is said in a sentence."""
    store = Store(config.url, config.busy_timeout)
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True)
        migrate.upgrade(store)
    except migrate.NewerDatabase as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"data_dir {config.data_dir}: {error.strerror}") from None
    except DBAPIError as error:
        raise ConfigError(f"database {store.url}: {error.orig}") from None
    finally:
        store.close()


def run(config: Config) -> bool:
    """Serve until a signal comes.

    Returns:
        Whether the server had started; it says itself why it could not.

    Raises:
        ConfigError: the configuration would be unsafe, or its database can't be used.
    """
    config.check()
    _prepare(config)
    app = create_app(config)
    server = Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level=config.log_level,
            access_log=config.log_level == "debug",
            server_header=False,
            date_header=True,
            proxy_headers=False,
            http="h11",
            ws="none",
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=STOP_SECONDS,
            limit_concurrency=1000,
            lifespan="on",
        ),
        app,
    )
    server.run()
    return server.started
