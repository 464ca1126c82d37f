"""Requests to a vLLM server over its unix socket. Each has a deadline, and fails at once if the server has ended."""

import asyncio
import itertools
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from keel.endpoints.event_loop import outcome
from keel.errors import EngineError

BASE = "http://engine"
HEALTH_SECONDS = 5.0
WATCH_SECONDS = 0.2
END_POLLS = 40
HEALTH_POLLS = 10
"""number of checks whether the server has ended between two requests for its health"""
MOST_CONNECTIONS = 256
SHOWN = 300  # characters of a reply in an error
RESUME = "continue with --resume, which starts a new engine"
NOT_FINITE = "Out of range float values"


class EngineRefusal(EngineError):
    """The engine replied that it could not do what it was asked for."""


class EngineClient:
    """A client of one server. Every error is an EngineError."""

    def __init__(self, path: Path, timeout_seconds: float, require_alive: Callable[[], None]) -> None:
        """Args: `require_alive` raises EngineError if the server has ended."""
        self.socket, self.timeout_seconds, self.require_alive = str(path), timeout_seconds, require_alive

    def is_healthy(self) -> bool:
        """Whether the server replies that it is healthy."""
        transport = httpx.HTTPTransport(uds=self.socket)
        try:
            with socket.socket(socket.AF_UNIX) as trial:  # httpcore leaves a socket open that cannot connect
                trial.connect(self.socket)
            with httpx.Client(transport=transport, base_url=BASE, timeout=HEALTH_SECONDS, trust_env=False) as client:
                return client.get("/health").status_code == 200
        except (httpx.HTTPError, OSError):
            return False

    def get(self, path: str) -> dict[str, Any]:
        return self.send([("GET", path, None)])[0]

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self.send([("POST", path, body)])[0]

    def complete(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the completion of each request. All run at the same time, with one deadline together."""
        return self.send([("POST", "/v1/completions", request) for request in requests])

    def send(self, requests: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> list[dict[str, Any]]:
        """Send requests (method, path, body) at the same time, and return the objects of their replies."""
        self.require_alive()
        results: list[dict[str, Any]] = outcome(self._send(requests))
        return results

    async def _send(self, requests: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> list[dict[str, Any]]:
        path = requests[0][1].partition("?")[0]
        limits = httpx.Limits(max_connections=MOST_CONNECTIONS)
        transport = httpx.AsyncHTTPTransport(uds=self.socket, limits=limits)
        client = httpx.AsyncClient(transport=transport, base_url=BASE, timeout=None, trust_env=False)
        try:
            # A server whose engine process hangs still says that it is healthy: only a deadline ends the wait.
            async with asyncio.timeout(self.timeout_seconds), client, asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch())
                tasks = [group.create_task(_exchange(client, *request)) for request in requests]
                replies = [await task for task in tasks]
                watch.cancel()
                return replies
        except TimeoutError:
            what = f"the engine did not reply within {self.timeout_seconds:g} s"
            raise EngineError(what, path, f"raise rollout.vllm.timeout_seconds, or {RESUME}") from None
        except ExceptionGroup as group:
            known = [error for error in _leaves(group) if isinstance(error, EngineError)]
            if known:
                raise known[0] from None
            broken = _leaves(group)[0]
        await self._wait_for_end()
        raise EngineError(f"the connection to the engine broke ({broken!r})", path, RESUME)

    async def _wait_for_end(self) -> None:
        """Give a server whose connection broke a moment to end. Raises EngineError with its last line if it does."""
        for _ in range(END_POLLS):
            await asyncio.sleep(WATCH_SECONDS)
            self.require_alive()

    async def _watch(self) -> None:
        """Raise EngineError as soon as the server has ended, or reports that its engine process has.

        A request to a server without an engine process would wait for ever.
        """
        transport = httpx.AsyncHTTPTransport(uds=self.socket)
        async with httpx.AsyncClient(transport=transport, base_url=BASE, timeout=HEALTH_SECONDS) as client:
            for poll in itertools.count(1):
                await asyncio.sleep(WATCH_SECONDS)
                self.require_alive()
                if poll % HEALTH_POLLS:
                    continue
                with suppress(httpx.HTTPError):  # a busy server may reply late; the requests notice a broken connection
                    status = (await client.get("/health")).status_code
                    if status != 200:
                        raise EngineError(f"the engine is not healthy any more (HTTP {status})", "/health", RESUME)


async def _exchange(
    client: httpx.AsyncClient, method: str, path: str, body: Mapping[str, Any] | None
) -> dict[str, Any]:
    reply = await client.request(method, path, json=body)
    if reply.status_code != 200:
        raise EngineRefusal(*_refusal(reply), RESUME)
    if not reply.content:
        return {}
    try:
        content = reply.json()
    except (ValueError, RecursionError):
        raise EngineError("the reply of the engine is not JSON", path, RESUME) from None
    if not isinstance(content, dict):
        raise EngineError("the reply of the engine is not an object", path, RESUME)
    return content


def _refusal(reply: httpx.Response) -> tuple[str, str]:
    """Return what is wrong, and the path."""
    path, text = reply.request.url.path, " ".join(reply.text.split())[:SHOWN]
    if NOT_FINITE in text:
        return "the engine's log-probabilities are not finite", path
    return f"HTTP {reply.status_code} from the engine ({text or 'without a reason'})", path


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    nested = [_leaves(error) if isinstance(error, BaseExceptionGroup) else [error] for error in group.exceptions]
    return [error for errors in nested for error in errors]
