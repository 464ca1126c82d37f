"""Which connections a server keeps: no address takes all of them, and some are left for who is signed in."""

from collections.abc import Iterable
from typing import Protocol

from starlette.types import Scope

WELCOME = "keel.welcome"
"""Under this name a request's state holds what to call when it came from somebody who is signed in."""


class Place(Protocol):
    """A connection."""

    @property
    def address(self) -> str: ...

    @property
    def is_idle(self) -> bool:
        """Whether no request of it is being answered."""

    def drop(self) -> None: ...


class Places:
    """The connections of a server that holds `most`. An address has at most half of them, and who is not signed in
    three quarters: then the oldest idle connection is dropped for a new one, so that who comes to ask is served."""

    def __init__(self, most: int) -> None:
        self.each, self.strangers_together = max(most // 2, 1), max(most * 3 // 4, 1)
        self.strangers: dict[Place, None] = {}  # the oldest first
        self.signed_in: dict[Place, None] = {}

    def came(self, new: Place) -> None:
        same = [place for place in (*self.strangers, *self.signed_in) if place.address == new.address]
        if len(same) >= self.each:
            self._drop_one(same, new)
        elif len(self.strangers) >= self.strangers_together:
            self._drop_one(list(self.strangers), new)
        self.strangers[new] = None

    def knows(self, place: Place) -> None:
        """A request of it came from somebody who is signed in."""
        if place in self.strangers:
            del self.strangers[place]
            self.signed_in[place] = None

    def leave(self, place: Place) -> None:
        self.strangers.pop(place, None)
        self.signed_in.pop(place, None)

    def _drop_one(self, places: Iterable[Place], new: Place) -> None:
        oldest = next((place for place in places if place.is_idle), new)
        self.leave(oldest)
        oldest.drop()


def welcome(scope: Scope) -> None:
    """Note that a request came from somebody who is signed in."""
    known = scope.get("state", {}).get(WELCOME)
    if known is not None:
        known()
