"""Many at once, and some who never finish: what the servers of `keel rank` and `keel serve` have to bear."""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from keel.server.limits import HEADER_SECONDS


def p95(times: list[float]) -> float:
    return sorted(times)[int(0.95 * len(times))]


def all_at_once(works: Sequence[Callable[[], None]]) -> None:
    """Each in a thread; returns when all are done."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def are_cut_off(port: int, beginnings: Sequence[bytes]) -> bool:
    """A client sends each beginning of a request and then drips: whether the server ends all of them in time."""
    slow = [socket.create_connection(("127.0.0.1", port), 30) for _ in beginnings]
    for connection, beginning in zip(slow, beginnings, strict=True):
        connection.sendall(beginning)
    began = time.monotonic()
    while time.monotonic() - began < HEADER_SECONDS - 1:
        for connection in slow:
            with suppress(OSError):
                connection.sendall(b"z")
        time.sleep(0.5)
    ends = [is_over(connection) for connection in slow]
    return all(ends) and time.monotonic() - began < HEADER_SECONDS + 10


def is_over(connection: socket.socket) -> bool:
    """Whether the server ends the connection, sooner or later."""
    with connection, suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return True
