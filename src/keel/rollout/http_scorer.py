"""A scorer that runs in another process, behind HTTP."""

import asyncio
import os
import uuid
from typing import Any

import httpx

from keel.data.batches import Rollouts
from keel.endpoints.addresses import refuse_link_local, resolve_host
from keel.endpoints.event_loop import outcome
from keel.endpoints.keys import check_key
from keel.errors import ConfigError, RewardError
from keel.rollout.score_check import Score, check_scores

DEADLINE_SECONDS = 60.0
"""Default deadline of a batch."""
MAX_RESPONSE_BYTES = 8 * 2**20
MAX_REASON_BYTES = 4096
RETRYABLE = {408, 425, 429, 500, 502, 503, 504}
TOKEN = "KEEL_REWARD_TOKEN"
"""Environment variable with the server's token. It is sent as a bearer token and never written to a file."""


class HttpScorer:
    """A server that is called with POST {"query": [prompt + response], "prompts": [prompt]} -> {"rewards": [number]}.

    There is one request at a time. All attempts for a batch have the same Idempotency-Key, so that a server need not
    repeat or count twice the work that it had done when the connection broke.
    """

    def __init__(self, url: str, name: str, weight: float, noisy: bool, timeout_seconds: float) -> None:
        try:
            is_http = httpx.URL(url).scheme in ("http", "https")
        except httpx.InvalidURL:
            is_http = False
        if is_http and (httpx.URL(url).userinfo or "token" in httpx.URL(url).params):
            what = "the address holds a secret, which would be written to files"
            raise ConfigError(what, where="rewards.url", fix=f"set the secret in {TOKEN}")
        if not is_http:
            raise ConfigError(
                f"{url!r} is not an http(s) address", where="rewards.url", fix="write it as http://HOST:PORT/PATH"
            )
        check_key(TOKEN)
        self.url, self.name, self.weight, self.noisy, self.timeout_seconds = url, name, weight, noisy, timeout_seconds
        self.verify = httpx.create_ssl_context()  # made once, since it takes a tenth of a second

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        if not rollouts.texts:  # of a process whose share is empty
            return []
        prompts = [prompt.text for prompt in rollouts.prompts]
        body = {"query": [p + text for p, text in zip(prompts, rollouts.texts, strict=True)], "prompts": prompts}
        if segments is not None:
            body["segments"] = segments  # type: ignore[assignment]
        reply = outcome(self._post(body))
        if not isinstance(reply, dict) or "rewards" not in reply:
            raise RewardError('the reply of the server has no field "rewards"', where=self.url)
        return check_scores(reply["rewards"], rollouts, self.url)

    async def _post(self, body: dict[str, Any]) -> Any:
        """Post the body and return the JSON of the reply. Retry temporary failures until the deadline.

        The pauses between attempts grow.
        """
        headers = {"Idempotency-Key": uuid.uuid4().hex, "Accept-Encoding": "identity"}
        if os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {os.environ[TOKEN]}"
        deadline = asyncio.get_running_loop().time() + self.timeout_seconds
        last: Exception = TimeoutError()
        attempt, pause = 0, 0.5
        async with httpx.AsyncClient(
            timeout=None, follow_redirects=False, headers=headers, verify=self.verify
        ) as client:
            while True:
                attempt += 1
                try:
                    # A limit for the full exchange also stops a server that sends a byte now and then.
                    async with asyncio.timeout_at(deadline):
                        refuse_link_local(await resolve_host(httpx.URL(self.url)), self.url)
                        return await self._exchange(client, body)
                except (httpx.TransportError, OSError, _TemporaryFailure) as error:  # a TimeoutError is an OSError
                    last = error
                wait = max(pause, last.seconds if isinstance(last, _TemporaryFailure) else 0.0)
                if asyncio.get_running_loop().time() + wait > deadline:
                    reason = f"no reply within {self.timeout_seconds:g} s ({attempt} attempts; last: {last!r})"
                    raise RewardError(reason, where=self.url, fix="start the server") from last
                await asyncio.sleep(wait)
                pause = min(2 * pause, 10.0)

    async def _exchange(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Any:
        chunks, size = [], 0
        async with client.stream("POST", self.url, json=body) as response:
            if response.status_code in RETRYABLE:
                raise _TemporaryFailure(f"HTTP {response.status_code}", response.headers.get("Retry-After", ""))
            refused = response.status_code != 200
            # Decompressed, a small reply could fill the memory.
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise RewardError("the reply of the server is compressed", self.url, "send it uncompressed")
            async for chunk in response.aiter_raw():
                chunks.append(chunk)
                size += len(chunk)
                if size > (MAX_REASON_BYTES if refused else MAX_RESPONSE_BYTES):
                    break
        if refused:
            fix = f"set {TOKEN} to the server's token" if response.status_code == 401 else ""
            raise RewardError(f"HTTP {response.status_code}{_reason(b''.join(chunks))}", where=self.url, fix=fix)
        if size > MAX_RESPONSE_BYTES:
            raise RewardError(f"the reply of the server is larger than {MAX_RESPONSE_BYTES} bytes", where=self.url)
        try:
            return httpx.Response(200, content=b"".join(chunks)).json()
        except (ValueError, RecursionError):
            raise RewardError("the reply of the server is not JSON", where=self.url) from None


def _reason(body: bytes) -> str:
    """Return the field "error" of a refusal, in parentheses; empty if the refusal has none."""
    try:
        reason = httpx.Response(200, content=body).json()["error"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return f" ({str(reason)[:200]})"


class _TemporaryFailure(Exception):
    """A failure that another attempt may not have, after `seconds` if the server sent a Retry-After."""

    def __init__(self, what: str, retry_after: str) -> None:
        super().__init__(what)
        self.seconds = float(retry_after[:9]) if retry_after.isascii() and retry_after.isdecimal() else 0.0
