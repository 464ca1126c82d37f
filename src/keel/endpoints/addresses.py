"""Look up the addresses of hosts, and refuse those of a cloud's metadata service."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress

import httpx

from keel.errors import RewardError

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
