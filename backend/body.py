"""Request bodies with a limit that is enforced while they arrive."""

from __future__ import annotations

import asyncio
import contextlib
import zlib

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .problems import MEDIA_TYPE, ProblemError

LINGER_SECONDS = 2.0
_UNPACKED = ((b"connection", b"close"), (b"content-encoding", b"identity"))
"""A packer would hold the answer back until the body is over."""
MIB = 1024 * 1024


class BodyRefused(Exception):
    """The body is too large; carries the answer."""

    def __init__(self, response: Response) -> None:
        super().__init__("body refused")
        self.response = response


class RefusalResponse(Response):
    """413 that reaches a client which is still sending.

    Closing at once would reset the connection and the client might never read the answer. So the
    answer goes out, then what still arrives is thrown away for a moment, unread and unkept.
    """

    media_type = MEDIA_TYPE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, then let the client notice."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": [*self.raw_headers, *_UNPACKED],
            }
        )
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


async def read(request: Request, *, max_body: int, max_unpacked: int) -> bytes:
    """The body, unpacked.

    Args:
        max_body: most bytes as sent.
        max_unpacked: most bytes after gunzip.

    Raises:
        BodyRefused: larger than a limit (413); it is noticed before the body is complete.
        ProblemError: packed in a way that is not known (415), or broken (400).
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise ProblemError(
            415, "unsupported-encoding", f"Content-Encoding: {encoding[:50]}; allowed: gzip."
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_body:
        raise _too_large(f"{int(announced)} bytes", max_body, "as sent")
    unpacker = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
    parts: list[bytes] = []
    sent = unpacked = 0
    try:
        async for chunk in request.stream():
            sent += len(chunk)
            if sent > max_body:
                raise _too_large(f"more than {max_body} bytes", max_body, "as sent")
            if unpacker is not None:
                chunk = _unpack(unpacker, chunk, max_unpacked - unpacked)
            unpacked += len(chunk)
            if unpacked > max_unpacked:
                raise _too_large(f"more than {max_unpacked} bytes", max_unpacked, "unpacked")
            parts.append(chunk)
    except ClientDisconnect:
        raise ProblemError(400, "incomplete-body", "The body ended early.") from None
    if unpacker is not None and not unpacker.eof:
        raise ProblemError(400, "broken-gzip", "body: ends before the gzip stream does.")
    return b"".join(parts)


def _unpack(unpacker: zlib._Decompress, chunk: bytes, room: int) -> bytes:
    try:
        # one byte over the limit is enough to know that it is passed
        return unpacker.decompress(chunk, room + 1)
    except zlib.error as error:
        raise ProblemError(400, "broken-gzip", f"body: is not gzip ({error}).") from None


def _too_large(value: str, limit: int, what: str) -> BodyRefused:
    problem = ProblemError(
        413,
        "too-large",
        f"body: {value}; allowed: at most {limit} bytes ({limit / MIB:g} MiB) {what}.",
    ).problem
    return BodyRefused(RefusalResponse(problem.model_dump_json(), status_code=413))
