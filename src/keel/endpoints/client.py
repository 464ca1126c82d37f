"""Requests to an OpenAI-compatible endpoint, with retries and a deadline for each batch."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from keel.endpoints.addresses import refuse_link_local, resolve_host
from keel.endpoints.event_loop import outcome
from keel.endpoints.keys import check_key
from keel.errors import ConfigError, EngineError, RewardError

POLICY_KEY, JUDGE_KEY = "KEEL_POLICY_KEY", "KEEL_JUDGE_KEY"
"""Environment variables with the keys of endpoints. A key is sent as a bearer token and never written to a file."""
DEADLINE_SECONDS = 600.0
AT_ONCE = 16
REFUSED_REQUEST = {400, 413, 422}
"""Statuses that say something about one request, and nothing about the next one."""
MOST_ERRORS = 3
"""Attempts after which a request counts as refused if each ended with HTTP 500: vLLM without a grammar engine, for
example, fails with 500 for a schema, however often it is asked."""
RETRYABLE = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_REPLY_BYTES = 8 * 2**20
SHOWN = 200
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Refusal:
    """The reason for which an endpoint refused one request."""

    reason: str


class EndpointClient:
    """A client of one model of an endpoint.

    There are at most AT_ONCE requests at a time.
    """

    def __init__(
        self,
        url: str,
        model: str,
        deadline_seconds: float = DEADLINE_SECONDS,
        key: str = POLICY_KEY,
        where: str = "policy",
        on_failure: str = "start the server, or lower sampling.batch_size",
    ) -> None:
        """Check the address.

        Args:
            key: environment variable with the endpoint's key.
            where: setting that holds the address, for errors.
            on_failure: what to do about a batch that is late, for errors.

        Raises ConfigError for an address that is none, holds a secret, or would send the key unencrypted, and for a key
        that is none.
        """
        self.url, self.model, self.deadline_seconds = url, model, deadline_seconds
        self.key, self.on_failure = key, on_failure
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url!r} is not an address", where, "write http://HOST/v1#MODEL") from None
        if parsed.userinfo or parsed.query:
            shown = str(parsed.copy_with(userinfo=b"", query=None))
            raise ConfigError("the address may hold a secret, which would be written to files", shown, f"set {key}")
        if os.environ.get(key) and parsed.scheme == "http" and parsed.host not in LOCAL:
            raise ConfigError(f"{key} would be sent unencrypted", url, "use https, or unset the variable")
        check_key(key)

    def complete(
        self, bodies: Sequence[Mapping[str, Any]], received: Callable[[int, Any], None] | None = None
    ) -> list[Any]:
        """Return the reply to each request, in order.

        Args:
            received: called with the index of a request and its reply as soon as it arrives. With it, a request that
                the endpoint refuses has a `Refusal` for a reply, and the others continue.

        Raises EngineError.
        """
        replies: list[Any] = outcome(self._complete(bodies, received))
        return replies

    async def _complete(
        self, bodies: Sequence[Mapping[str, Any]], received: Callable[[int, Any], None] | None
    ) -> list[Any]:
        key = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limit, failures = asyncio.Semaphore(AT_ONCE), list[str]()

        async def complete(index: int, body: Mapping[str, Any]) -> Any:
            async with limit:
                reply = await self._retry(client, body, failures, MOST_ERRORS if received is not None else None)
            if isinstance(reply, Refusal) and received is None:
                raise EngineError(reply.reason, self.url, "check the address")
            if received is not None:
                received(index, reply)
            return reply

        try:
            async with (
                asyncio.timeout(self.deadline_seconds),
                httpx.AsyncClient(timeout=None, follow_redirects=False, headers=headers) as client,
                asyncio.TaskGroup() as group,
            ):
                host = httpx.URL(self.url)
                refuse_link_local(await resolve_host(host), self.url)
                tasks = [group.create_task(complete(index, body)) for index, body in enumerate(bodies)]
        except TimeoutError:
            last = f"; last: {failures[-1]}" if failures else ""
            what = f"no reply within {self.deadline_seconds:g} s{last}"
            raise EngineError(what, self.url, self.on_failure) from None
        except ExceptionGroup as group_error:
            raise _cause(group_error, self.url) from None
        return [task.result() for task in tasks]

    async def _retry(
        self, client: httpx.AsyncClient, body: Mapping[str, Any], failures: list[str], most_errors: int | None
    ) -> Any:
        """Send a request until it succeeds, with growing pauses. The deadline of the batch ends it.

        Args:
            most_errors: number of replies with HTTP 500 after which the request is refused.
        """
        path = "/chat/completions" if "messages" in body else "/completions"
        pause, errors = 0.5, 0
        while True:
            try:
                async with client.stream("POST", self.url + path, json={"model": self.model, **body}) as reply:
                    content = await self._read(reply)
            except httpx.TransportError as error:
                failures.append(repr(error))
            else:
                if reply.status_code not in RETRYABLE:
                    return self._parse(reply.status_code, content)
                failures.append(self._status(reply.status_code, content))
                errors += reply.status_code == 500
                if errors == most_errors:
                    return Refusal(failures[-1])
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
            reason = self._status(status, content)
            if status in REFUSED_REQUEST:
                return Refusal(reason)
            fix = f"set {self.key} to the key of the endpoint" if status in (401, 403) else "check the address"
            raise EngineError(reason, self.url, fix)
        try:
            return httpx.Response(200, content=content).json()
        except (ValueError, RecursionError):
            raise EngineError("the reply is not JSON", self.url, "check the address") from None

    def _status(self, status: int, content: bytes) -> str:
        """Describe a refusal by its beginning, without the key, which some servers repeat."""
        text, key = " ".join(content.decode(errors="replace").split()), os.environ.get(self.key)
        shown = (text.replace(key, f"[{self.key}]") if key else text)[:SHOWN]
        return f"HTTP {status} ({shown or 'without a reason'})"


def _cause(group: ExceptionGroup[Any], url: str) -> Exception:
    first = group.exceptions[0]
    if isinstance(first, ExceptionGroup):
        return _cause(first, url)
    if isinstance(first, EngineError | RewardError):
        return EngineError(first.what, first.where, first.fix)
    if isinstance(first, OSError):
        return EngineError(f"the host cannot be reached ({first})", url, "check the address")
    return first
