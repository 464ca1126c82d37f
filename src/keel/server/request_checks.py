"""What every answer carries, and what no request gets past, whatever the page."""

from asyncio import Lock
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keel.server.limits import LOCAL, Refused, accepted_host_headers, check_framing, check_host

MOST_WAITING = 16  # requests of one person
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'none'; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def accepted_hosts(host: str, names: Sequence[str], address: str | None, port: int) -> frozenset[str]:
    """What the Host header may say: also the name of the proxy in front, which hands it on."""
    proxy = (address or "").partition("://")[2].lower()
    return accepted_host_headers((*LOCAL, host, *names), port) | ({proxy, f"{proxy}:443"} if proxy else set())


class Shield:
    """ASGI middleware, outermost: refuses what was meant for another server, and adds the headers to every answer."""

    def __init__(self, app: ASGIApp, names: frozenset[str], refuse: Callable[[Scope, Refused], Response]) -> None:
        self.app, self.names, self.refuse = app, names, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self.app
        if scope["type"] == "http":
            try:
                headers = Headers(scope=scope)
                check_framing(headers)
                check_host(headers, self.names)
            except Refused as refused:
                answer = self.refuse(scope, refused)
        await answer(scope, receive, send_with_headers)


class Turns:
    """One request of a person at a time: who sends a flood stands in their own queue, not in that of others."""

    def __init__(self) -> None:
        self.locks: defaultdict[str, Lock] = defaultdict(Lock)
        self.waiting: Counter[str] = Counter()

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Raises Refused when the queue is long."""
        if self.waiting[name] >= MOST_WAITING:
            raise Refused(503, "Too many requests at once.", {"Retry-After": "1"})
        self.waiting[name] += 1
        try:
            async with self.locks[name]:
                yield
        finally:
            self.waiting[name] -= 1
