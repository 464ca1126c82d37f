"""A scorer that runs in another process, behind HTTP."""

import asyncio
import ipaddress
import os
import socket
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import httpx

from keel.data.batches import Rollouts
from keel.errors import ConfigError, RewardError
from keel.rollout.event_loop import outcome
from keel.rollout.score_check import Score, check_scores

DEADLINE_SECONDS = 60.0
"""Default deadline of a batch."""
MAX_RESPONSE_BYTES = 8 * 2**20
MAX_REASON_BYTES = 4096
RETRYABLE = {408, 425, 429, 500, 502, 503, 504}
TOKEN = "KEEL_REWARD_TOKEN"
"""Environment variable with the server's token. It is sent as a bearer token and never written to a file."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
METADATA = frozenset(
    map(
        ipaddress.ip_address,
        # Alibaba, Azure, Oracle, Amazon, Google; the other clouds use link-local addresses
        ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"),
    )
)
ENDS_IN_IPV4 = [ipaddress.ip_network(text) for text in ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")]
"""Networks whose addresses end in an IPv4 address: compatible and translated addresses, and NAT64 with its well-known
and its local prefix."""


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


def refuse_link_local(addresses: Iterable[str], url: str) -> None:
    """Raise RewardError for the address of a cloud's metadata service, in any notation.

    Such a service gives the machine's credentials to any process that asks for them.
    """
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        for target in (address, *embedded_addresses(address)):
            if target.is_link_local:
                raise RewardError(f"{address} is a link-local address, which no reward server has", where=url)
            if target in METADATA:
                raise RewardError(f"{address} is the address of a cloud's metadata service", where=url)


def embedded_addresses(address: Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address embeds, in any of the notations for it."""
    if not isinstance(address, ipaddress.IPv6Address):
        return []
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    tunnel = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    is_isatap = (int(address) >> 32) & 0xFCFFFFFF == 0x5EFE
    ends = is_isatap or any(address in network for network in ENDS_IN_IPV4)
    return [each for each in (*tunnel, last if ends else None) if each is not None]


async def resolve_host(url: httpx.URL) -> set[str]:
    """Look up the addresses of the host, in a thread that can be abandoned. Raises OSError."""
    loop = asyncio.get_running_loop()
    addresses: asyncio.Future[set[str]] = loop.create_future()

    def resolve() -> None:
        try:
            result: set[str] | OSError = {str(entry[4][0]) for entry in socket.getaddrinfo(url.host, url.port)}
        except OSError as error:
            result = error
        with suppress(RuntimeError):  # the loop was closed in the meantime
            loop.call_soon_threadsafe(settle, result)

    def settle(result: set[str] | OSError) -> None:
        if not addresses.done():
            addresses.set_exception(result) if isinstance(result, OSError) else addresses.set_result(result)

    threading.Thread(target=resolve, daemon=True).start()
    return await addresses
