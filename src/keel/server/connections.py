"""Limits on open connections, so that neither one address nor clients without a token can use up a server."""

from collections.abc import Iterable
from typing import Protocol

from starlette.types import Scope

ON_AUTHENTICATION = "keel.on_authentication"
"""Key in the state of a request. The value is called when the request turns out to come from a signed-in client."""


class Connection(Protocol):
    @property
    def address(self) -> str: ...

    @property
    def is_idle(self) -> bool:
        """Whether no request of this connection is being processed."""

    def drop(self) -> None: ...


class ConnectionLimits:
    """The open connections of a server that accepts at most `max_connections`.

    One address has at most half of them. Clients that have not signed in have at most three quarters. Beyond that, the
    oldest idle connection is dropped in favour of the new one, so that new visitors are still served.
    """

    def __init__(self, max_connections: int) -> None:
        self.max_per_address, self.max_anonymous = max(max_connections // 2, 1), max(max_connections * 3 // 4, 1)
        self.anonymous: dict[Connection, None] = {}  # oldest first
        self.signed_in: dict[Connection, None] = {}

    def add(self, connection: Connection) -> None:
        same_address = [each for each in (*self.anonymous, *self.signed_in) if each.address == connection.address]
        if len(same_address) >= self.max_per_address:
            self._drop_one(same_address, connection)
        elif len(self.anonymous) >= self.max_anonymous:
            self._drop_one(list(self.anonymous), connection)
        self.anonymous[connection] = None

    def promote(self, connection: Connection) -> None:
        """Exempt a connection of a signed-in client from the limit for anonymous ones."""
        if connection in self.anonymous:
            del self.anonymous[connection]
            self.signed_in[connection] = None

    def remove(self, connection: Connection) -> None:
        self.anonymous.pop(connection, None)
        self.signed_in.pop(connection, None)

    def _drop_one(self, connections: Iterable[Connection], new: Connection) -> None:
        oldest = next((each for each in connections if each.is_idle), new)
        self.remove(oldest)
        oldest.drop()


def note_authentication(scope: Scope) -> None:
    """Record that the request of this scope comes from a signed-in client."""
    callback = scope.get("state", {}).get(ON_AUTHENTICATION)
    if callback is not None:
        callback()
