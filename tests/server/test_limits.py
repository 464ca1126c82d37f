"""What servers listen with."""

import socket

import pytest

from keel.server.limits import listening


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_sends_at_once(host: str) -> None:
    """Otherwise the system holds the body of a page back until the browser has acknowledged its headers."""
    with listening(host, 0) as server, socket.create_connection(server.getsockname()[:2]), server.accept()[0] as one:
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
