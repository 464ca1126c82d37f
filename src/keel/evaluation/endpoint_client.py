"""Requests to an OpenAI-compatible endpoint, with retries and a deadline for each batch."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from keel.errors import ConfigError, EngineError, RewardError
from keel.rollout.event_loop import outcome
from keel.rollout.http_scorer import refuse_link_local, resolve_host

KEY = "KEEL_POLICY_KEY"
"""Environment variable with the endpoint's key. It is sent as a bearer token and never written to a file."""
DEADLINE_SECONDS = 600.0
AT_ONCE = 16
RETRYABLE = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_REPLY_BYTES = 8 * 2**20
SHOWN = 200
LOCAL = ("localhost", "127.0.0.1", "::1")


class EndpointClient:
    """A client of one model of an endpoint."""

    def __init__(self, url: str, model: str, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        """Raises ConfigError for an address that is none, holds a secret, or would send the key unencrypted."""
        self.url, self.model, self.deadline_seconds = url, model, deadline_seconds
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise ConfigError(f"{url!r} is not an address", "policy", "write http://HOST/v1#MODEL") from None
        if parsed.userinfo or parsed.query:
            shown = str(parsed.copy_with(userinfo=b"", query=None))
            raise ConfigError("the address may hold a secret, which would be written to files", shown, f"set {KEY}")
        if os.environ.get(KEY) and parsed.scheme == "http" and parsed.host not in LOCAL:
            raise ConfigError(f"{KEY} would be sent unencrypted", url, "use https, or unset the variable")

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the reply to each request, in order. Raises EngineError."""
        replies: list[Any] = outcome(self._complete(bodies))
        return replies

    async def _complete(self, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        limit, failures = asyncio.Semaphore(AT_ONCE), list[str]()

        async def complete(body: Mapping[str, Any]) -> Any:
            async with limit:
                return await self._retry(client, body, failures)

        try:
            async with (
                asyncio.timeout(self.deadline_seconds),
                httpx.AsyncClient(timeout=None, follow_redirects=False, headers=headers) as client,
                asyncio.TaskGroup() as group,
            ):
                host = httpx.URL(self.url)
                refuse_link_local(await resolve_host(host), self.url)
                tasks = [group.create_task(complete(body)) for body in bodies]
        except TimeoutError:
            last = f"; last: {failures[-1]}" if failures else ""
            what = f"no reply within {self.deadline_seconds:g} s{last}"
            raise EngineError(what, self.url, "start the server, or lower sampling.batch_size") from None
        except ExceptionGroup as group_error:
            raise _cause(group_error, self.url) from None
        return [task.result() for task in tasks]

    async def _retry(self, client: httpx.AsyncClient, body: Mapping[str, Any], failures: list[str]) -> Any:
        """Send a request until it succeeds, with growing pauses. The deadline of the batch ends it."""
        path = "/chat/completions" if "messages" in body else "/completions"
        pause = 0.5
        while True:
            try:
                async with client.stream("POST", self.url + path, json={"model": self.model, **body}) as reply:
                    content = await self._read(reply)
            except httpx.TransportError as error:
                failures.append(repr(error))
            else:
                if reply.status_code not in RETRYABLE:
                    return self._parse(reply.status_code, content)
                failures.append(f"HTTP {reply.status_code}")
                after = reply.headers.get("Retry-After", "")
                pause = max(pause, float(after[:4]) if after.isascii() and after.isdecimal() else 0.0)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 20.0)

    async def _read(self, reply: httpx.Response) -> bytes:
        chunks, size = [], 0
        async for chunk in reply.aiter_bytes():
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_REPLY_BYTES:
                raise EngineError(f"a reply is larger than {MAX_REPLY_BYTES} bytes", self.url, "check the address")
        return b"".join(chunks)

    def _parse(self, status: int, content: bytes) -> Any:
        if status != 200:
            fix = f"set {KEY} to the key of the endpoint" if status in (401, 403) else "check the address"
            text = " ".join(content.decode(errors="replace").split())[:SHOWN]
            raise EngineError(f"HTTP {status} ({text or 'without a reason'})", self.url, fix)
        try:
            return httpx.Response(200, content=content).json()
        except (ValueError, RecursionError):
            raise EngineError("the reply is not JSON", self.url, "check the address") from None


def _cause(group: ExceptionGroup[Any], url: str) -> Exception:
    first = group.exceptions[0]
    if isinstance(first, ExceptionGroup):
        return _cause(first, url)
    if isinstance(first, EngineError | RewardError):
        return EngineError(first.what, first.where, first.fix)
    if isinstance(first, OSError):
        return EngineError(f"the host cannot be reached ({first})", url, "check the address")
    return first
