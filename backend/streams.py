"""Server-sent events over ASGI.

Starlette's streaming response notices a client that has left only when it next sends; a mailbox
must know at once whether its plugin is there. So sending and listening run side by side here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}


def frame(data: bytes, *, event: str, id: int) -> bytes:
    """One event as it goes over the wire."""
    return format_sse_event(data_str=data.decode(), event=event, id=str(id))


class EventStream(Response):
    """A response that sends frames as they come, and a ping when there are none.

    Args:
        frames: yields finished frames, or None at a moment with nothing to say (a ping is due).
        ping_every: seconds of silence after which a ping goes out.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes] | None = None, ping_every: float = 15.0):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.frames = frames
        self.ping_every = ping_every

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the frames end or the client leaves."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # the ping at once lets a client behind a buffering proxy know that it is connected
        await send({"type": "http.response.body", "body": KEEPALIVE_COMMENT, "more_body": True})
        sending = asyncio.create_task(self._send(send))
        listening = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((sending, listening), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, listening):
                task.cancel()
            results = await asyncio.gather(sending, listening, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _send(self, send: Send) -> None:
        if self.frames is None:
            return
        iterator = self.frames.__aiter__()
        pending: asyncio.Task[bytes] | None = None
        try:
            while True:
                if pending is None:
                    pending = asyncio.ensure_future(_next(iterator))
                done, _ = await asyncio.wait((pending,), timeout=self.ping_every)
                body = KEEPALIVE_COMMENT
                if done:
                    try:
                        body = pending.result()
                    except StopAsyncIteration:
                        break
                    finally:
                        pending = None
                await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            close = getattr(iterator, "aclose", None)
            if close is not None:
                await close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _next(iterator: AsyncIterator[bytes]) -> bytes:
    return await iterator.__anext__()


async def _until_gone(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
