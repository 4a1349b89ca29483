"""Who may do what: tokens, the browser's cookie, host and origin, response headers."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import Config
from .problems import ProblemError, respond
from .schemas import SessionState
from .services import ServicesDep

COOKIE = "attnscope_session"
COOKIE_SECONDS = 30 * 24 * 3600
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "worker-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
RESPONSE_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Rights(NamedTuple):
    """What a caller may do."""

    read: bool
    steer: bool


ALL = Rights(read=True, steer=True)
READ = Rights(read=True, steer=False)
NONE = Rights(read=False, steer=False)


def rights_of_token(token: str, config: Config) -> Rights:
    """What a token allows; everything where the server wants none."""
    if not config.token:
        return ALL
    if _same(token, config.token):
        return ALL
    if config.read_token and _same(token, config.read_token):
        return READ
    return NONE


def rights(connection: HTTPConnection, config: Config) -> Rights:
    """What the caller of a request may do, by bearer token or cookie."""
    if not config.token:
        return ALL
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return rights_of_token(token.strip(), config)
    return _rights_of_cookie(connection.cookies.get(COOKIE, ""), config)


def state(config: Config, granted: Rights) -> SessionState:
    """Rights as the page reads them."""
    return SessionState(
        required=bool(config.token), may_read=granted.read, may_steer=granted.steer
    )


async def may_read(connection: HTTPConnection, services: ServicesDep) -> None:
    """Let only readers pass.

    Raises:
        ProblemError: no token that may read (401).
    """
    if not rights(connection, services.config).read:
        raise _unauthorized()


async def may_steer(connection: HTTPConnection, services: ServicesDep) -> None:
    """Let only those pass who may change things.

    Raises:
        ProblemError: no token (401), or one that may only read (403).
    """
    granted = rights(connection, services.config)
    if not granted.read:
        raise _unauthorized()
    if not granted.steer:
        raise ProblemError(403, "forbidden", "This token may only read; steering takes another.")


def set_cookie(response: Response, request: Request, granted: Rights, config: Config) -> None:
    """Hand a browser its session. The cookie holds a signature, never the token."""
    if not config.token:
        return
    role = "steer" if granted.steer else "read"
    expires = int(time.time()) + COOKIE_SECONDS
    response.set_cookie(
        COOKIE,
        f"{role}.{expires}.{_signature(role, expires, config)}",
        max_age=COOKIE_SECONDS,
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def clear_cookie(response: Response) -> None:
    """Take a browser's session away."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")


def _rights_of_cookie(cookie: str, config: Config) -> Rights:
    role, _, rest = cookie.partition(".")
    expires, _, signature = rest.partition(".")
    if role not in ("read", "steer") or not expires.isdecimal() or len(expires) > 12:
        return NONE
    if role == "read" and not config.read_token:
        return NONE
    if not _same(signature, _signature(role, int(expires), config)) or int(expires) < time.time():
        return NONE
    return ALL if role == "steer" else READ


def _signature(role: str, expires: int, config: Config) -> str:
    # a changed token ends the sessions that came of it
    key = config.token if role == "steer" else config.read_token
    message = f"attnscope-session.{role}.{expires}"
    return hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(
        hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest(),
        hashlib.sha256(expected.encode()).digest(),
    )


def _unauthorized() -> ProblemError:
    return ProblemError(
        401,
        "unauthorized",
        "This server wants a token: log in, or send Authorization: Bearer.",
        headers={"WWW-Authenticate": "Bearer"},
    )


class Guard:
    """ASGI middleware: refuses foreign hosts and origins, sets the security headers.

    Foreign hosts are refused against DNS rebinding, foreign origins because another web page
    must not steer the GPU.
    """

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self.app = app
        self.config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["method"], headers)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in RESPONSE_HEADERS.items():
                    out.setdefault(name, value)
                if scope["path"].startswith("/api/"):
                    out.setdefault("Cache-Control", "no-store")
            await send(message)

        if refusal is not None:
            await respond(refusal.problem)(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> ProblemError | None:
        host = headers.get("host", "")
        if not self.serves(host):
            return ProblemError(
                421,
                "wrong-host",
                f"Host: {host[:100]!r} is not a name of this server; allowed: localhost and "
                "what allowed_hosts (ATTNSCOPE_ALLOWED_HOSTS) names.",
            )
        if method in SAFE_METHODS:
            return None
        origin = headers.get("origin")
        foreign = origin is not None and not self._own_origin(origin, host)
        if foreign or (origin is None and headers.get("sec-fetch-site") == "cross-site"):
            return ProblemError(
                403,
                "foreign-origin",
                f"Origin: {(origin or '')[:100]!r} may not change anything here; allowed: this "
                "server's own and what allowed_origins (ATTNSCOPE_ALLOWED_ORIGINS) names.",
            )
        return None

    def serves(self, host: str) -> bool:
        """Whether a Host header names this server."""
        name = _host_name(host)
        if name is None:
            return False
        own = {item.lower() for item in self.config.allowed_hosts}
        if name in LOCAL_NAMES or name in own or name == self.config.host.lower():
            return True
        if self.config.loopback:
            return False
        try:
            # an address can't be rebound as a name can
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _own_origin(self, origin: str, host: str) -> bool:
        if origin in self.config.allowed_origins:
            return True
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _host_name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    if parts.username or parts.path or parts.query:
        return None
    return parts.hostname
