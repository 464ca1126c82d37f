"""What any request has to get past: it came to the right name, carries the token, and is not too large or too slow."""

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
from keel.server.connections import WELCOME, Places, welcome

LOCAL = ("127.0.0.1", "localhost", "::1")
HEADER_SECONDS = 10.0
BODY_SECONDS = 30.0


class Refused(Exception):
    """A request that gets an answer of this status."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.reason}, self.status, self.headers)


def new_token() -> str:
    """192 random bits."""
    return secrets.token_urlsafe(24)


def as_url_host(host: str) -> str:
    """Format a host for a URL."""
    return f"[{host}]" if ":" in host else host


def accepted_host_headers(hosts: Iterable[str], port: int) -> frozenset[str]:
    """What the Host header may say when a server answers to `hosts` at `port`."""
    names = frozenset(as_url_host(host).lower() for host in hosts)
    return frozenset(f"{name}:{port}" for name in names) | (names if port == 80 else frozenset())


def check_framing(headers: Headers) -> None:
    """Raises Refused for a request whose end two servers could see at two places (request smuggling)."""
    if "transfer-encoding" in headers and "content-length" in headers:
        raise Refused(400, "Content-Length and Transfer-Encoding together", {"Connection": "close"})


def check_host(headers: Headers, names: frozenset[str]) -> None:
    """Raises Refused unless the request was meant for this server.

    It keeps out pages of other sites that resolve their own name to this machine (DNS rebinding).
    """
    if headers.getlist("host")[:2] != [headers.get("host")] or headers["host"].lower() not in names:
        raise Refused(400, "this server has another name")


class Gate:
    """ASGI middleware: only requests to `hosts` at `port` that carry the token come through.

    The token is a bearer token, or the query parameter `token`.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Sequence[str], port: int) -> None:
        self.app, self.token, self.names = app, token, accepted_host_headers(hosts, port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a web socket, say, which nobody is offered
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
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = (
            bearer
            if kind.lower() == "bearer"
            else QueryParams(scope["query_string"].decode("latin-1")).get("token", "")
        )
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise Refused(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        welcome(scope)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request, which must say that it is JSON, and arrive whole. Raises Refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be application/json")
    too_large = Refused(413, f"the body is larger than {max_bytes} bytes")
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
        raise Refused(400, "the client went away") from None
    return bytes(body)


def parse_body(body: bytes) -> Any:
    """A body as JSON, of which every text can be written again. Raises Refused."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else str(error)[:200]
        raise Refused(400, f"the body is no JSON: {reason}") from None
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


class PromptProtocol(H11Protocol):
    """HTTP for clients that get to the point: a connection is cut when its first request, or the next one after an
    answer, has not begun in time, or the answer has not been taken by then; or for another one (connections.py)."""

    places: Places

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, WELCOME: lambda: self.places.knows(self)}
        self.places.came(self)
        self._wait_for_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self.places.leave(self)
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
        self._wait_for_more()

    def _wait_for_more(self) -> None:
        self.loop.call_later(HEADER_SECONDS, self._give_up, self.cycle)

    def _give_up(self, seen: RequestResponseCycle | None) -> None:
        if self.cycle is seen and not self.transport.is_closing():
            self.transport.abort()


def prompt_server(app: ASGIApp, max_connections: int) -> uvicorn.Server:
    """A server that keeps no log of addresses, in which there may be tokens."""
    config = uvicorn.Config(
        app,
        http=type("PromptProtocol", (PromptProtocol,), {"places": Places(max_connections)}),
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
    """Raises ConfigError for an address that other machines can reach, unless that is wanted."""
    if host not in LOCAL and not public:
        raise ConfigError(f"{host} can be reached from other machines", where="host", fix="add --public true")


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises ConfigError when it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise ConfigError(f"cannot listen at {host}:{port}: {reason}", where="port", fix="choose another") from error
    # Its connections inherit this. asyncio sets it only where the protocol is named; without it a page waits 40 ms for
    # the browser to acknowledge the headers.
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return server
