"""Limits of every HTTP server of keel: the Host header, the token, and the size and time of a request."""

import asyncio
import hmac
import json
import secrets
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import uvicorn
from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from keel.errors import ConfigError
from keel.server.connections import ON_AUTHENTICATION, ConnectionLimits, note_authentication

LOCAL = ("127.0.0.1", "localhost", "::1")
HEADER_SECONDS = 10.0
BODY_SECONDS = 30.0


class Refused(Exception):
    """A request is refused with this HTTP status."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.reason}, self.status, self.headers)


def new_token() -> str:
    """Return 192 random bits as text."""
    return secrets.token_urlsafe(24)


def as_url_host(host: str) -> str:
    """Format a host for a URL."""
    return f"[{host}]" if ":" in host else host


def accepted_host_headers(hosts: Iterable[str], port: int) -> frozenset[str]:
    """Return the values of the Host header that a server accepts under these names at this port."""
    names = frozenset(as_url_host(host).lower() for host in hosts)
    return frozenset(f"{name}:{port}" for name in names) | (names if port == 80 else frozenset())


def check_framing(headers: Headers) -> None:
    """Refuse a request whose end a proxy and this server could place differently (request smuggling).

    Raises Refused.
    """
    if "transfer-encoding" in headers and "content-length" in headers:
        raise Refused(400, "send either Content-Length or Transfer-Encoding, not both", {"Connection": "close"})


def check_host(headers: Headers, names: frozenset[str]) -> None:
    """Refuse a request for another host name: a site may resolve its own name to this machine (DNS rebinding).

    Raises Refused.
    """
    # Exactly one Host header: with two, a proxy may have checked the other one.
    if headers.getlist("host")[:2] != [headers.get("host")] or headers["host"].lower() not in names:
        raise Refused(400, "this server has another name")


class TokenGate:
    """ASGI middleware that passes requests to `hosts` at `port` with the token, and refuses all others.

    The token is sent as a bearer token or as the query parameter `token`.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Sequence[str], port: int) -> None:
        self.app, self.token, self.names = app, token, accepted_host_headers(hosts, port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # for example a WebSocket, which no server of keel offers
        try:
            self._check(scope)
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        check_framing(headers)
        check_host(headers, self.names)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        token = (
            bearer
            if scheme.lower() == "bearer"
            else QueryParams(scope["query_string"].decode("latin-1")).get("token", "")
        )
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            raise Refused(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        note_authentication(scope)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body of a JSON request.

    Raises Refused if the content type is not JSON, or the body is too large, too slow or incomplete.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be application/json")
    too_large = Refused(413, f"the body is larger than {max_bytes} bytes")
    # Refuse by the announced length at once. The loop below also counts, because the header may be absent or wrong.
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the client disconnected") from None
    return bytes(body)


def parse_body(body: bytes) -> Any:
    """Parse a body as JSON. Raises Refused, also for text that UTF-8 cannot encode."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_reject_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # JSON allows half of a surrogate pair, UTF-8 does not
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else str(error)[:200]
        raise Refused(400, f"the body is not JSON: {reason}") from None
    return value


def _reject_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which json.loads accepts although JSON does not have them."""
    raise ValueError(f"{name} is not a number")


class PromptProtocol(H11Protocol):
    """HTTP/1.1 with a time limit for idle connections.

    A connection is aborted HEADER_SECONDS after it was opened or a response was completed, unless its next request was
    received by then. It is also aborted if `ConnectionLimits` gives its place to another connection.
    """

    connection_limits: ConnectionLimits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, ON_AUTHENTICATION: lambda: self.connection_limits.promote(self)}
        self.connection_limits.add(self)
        self._limit_idle_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection_limits.remove(self)
        super().connection_lost(exc)

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def drop(self) -> None:
        self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._limit_idle_time()

    def _limit_idle_time(self) -> None:
        self.loop.call_later(HEADER_SECONDS, self._abort_if_idle, self.cycle)

    def _abort_if_idle(self, last_cycle: RequestResponseCycle | None) -> None:
        if self.cycle is last_cycle and not self.transport.is_closing():
            self.transport.abort()


def prompt_server(app: ASGIApp, max_connections: int) -> uvicorn.Server:
    """Build a server without an access log, because the addresses of requests may contain tokens."""
    config = uvicorn.Config(
        app,
        http=type("PromptProtocol", (PromptProtocol,), {"connection_limits": ConnectionLimits(max_connections)}),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)


def check_reach(host: str, public: bool) -> None:
    """Raise ConfigError for an address that other machines can reach, unless `public` allows it."""
    if host not in LOCAL and not public:
        raise ConfigError(f"{host} can be reached from other machines", where="host", fix="add --public true")


def listening(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises ConfigError if the address cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise ConfigError(
            f"cannot listen at {host}:{port}: {reason}", where="port", fix="choose another port"
        ) from error
    # Accepted connections inherit TCP_NODELAY. asyncio sets it only on sockets created with an explicit protocol.
    # Without it, a page waits 40 ms for the browser to acknowledge the headers.
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return server
