"""Checks of every request to the pages, and the security headers of every response."""

from asyncio import Lock
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keel.server.limits import LOCAL, Refused, accepted_host_headers, check_framing, check_host

MAX_WAITING = 16  # requests of one person that wait for their turn
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'none'; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def accepted_hosts(host: str, names: Sequence[str], address: str | None, port: int) -> frozenset[str]:
    """Return the accepted values of the Host header.

    They include the host of `address`, the public URL of a proxy in front, which forwards the header.
    """
    proxy = (address or "").partition("://")[2].lower()
    return accepted_host_headers((*LOCAL, host, *names), port) | ({proxy, f"{proxy}:443"} if proxy else set())


class Shield:
    """Outermost ASGI middleware: refuse requests for other hosts, and add the security headers to every response."""

    def __init__(self, app: ASGIApp, names: frozenset[str], refuse: Callable[[Scope, Refused], Response]) -> None:
        self.app, self.names, self.refuse = app, names, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        app = self.app
        if scope["type"] == "http":
            try:
                headers = Headers(scope=scope)
                check_framing(headers)
                check_host(headers, self.names)
            except Refused as refused:
                app = self.refuse(scope, refused)
        await app(scope, receive, send_with_headers)


class RequestQueues:
    """A queue for each person. One of their requests runs at a time, so a flood delays only its sender."""

    def __init__(self) -> None:
        self.locks: defaultdict[str, Lock] = defaultdict(Lock)
        self.waiting: Counter[str] = Counter()

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for this person's turn. Raises Refused if too many of their requests are waiting."""
        if self.waiting[name] >= MAX_WAITING:
            raise Refused(503, "Too many requests at once.", {"Retry-After": "1"})
        self.waiting[name] += 1
        try:
            async with self.locks[name]:
                yield
        finally:
            self.waiting[name] -= 1
