"""Sign-in: raters and the owner are identified by the token in their private link, then by a cookie."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request

from keel.server.connections import note_authentication
from keel.server.limits import Refused

TOKEN_HEADER = "x-keel-token"


@dataclass(frozen=True)
class Person:
    name: str  # "" for the owner
    token: str

    @property
    def is_owner(self) -> bool:
        return not self.name

    @property
    def csrf(self) -> str:
        """The value that a page must send back. Other sites cannot know it, and it does not reveal the token."""
        return hmac.new(self.token.encode(), b"keel rank", hashlib.sha256).hexdigest()


class People:
    """Everybody who has a private link."""

    def __init__(self, raters: Mapping[str, str], owner_token: str, port: int) -> None:
        self.people = [Person("", owner_token), *(Person(name, token) for name, token in raters.items())]
        self.port = port

    def holder(self, token: str) -> Person | None:
        """Return the person with this token, or None."""
        # Every token is compared, in constant time: the duration reveals neither a prefix nor the person's place.
        holders = [person for person in self.people if hmac.compare_digest(person.token.encode(), token.encode())]
        return holders[0] if holders else None

    def cookie_name(self, owner: bool) -> str:
        # Cookies are shared by all ports of a host, and one browser may hold both the owner's and a rater's page.
        return f"keel-owner-{self.port}" if owner else f"keel-{self.port}"

    def rater(self, request: Request) -> Person | None:
        return self._from_cookie(request, owner=False)

    def owner(self, request: Request) -> Person | None:
        return self._from_cookie(request, owner=True)

    def sender(self, request: Request) -> Person:
        """Return the rater whose page sent a request that changes something.

        Raises Refused if the sender is not signed in, or another site or another rater's page sent the request.
        """
        rater = self.rater(request)
        if rater is None:
            raise Refused(403, "open your private link first")
        if not is_same_origin(request.headers):
            raise Refused(403, "only a page of this server may send this")
        if not hmac.compare_digest(rater.csrf.encode(), request.headers.get(TOKEN_HEADER, "").encode()):
            raise Refused(403, "this page belongs to another rater; load it again")
        return rater

    def _from_cookie(self, request: Request, owner: bool) -> Person | None:
        person = self.holder(request.cookies.get(self.cookie_name(owner), ""))
        if person is None or person.is_owner != owner:
            return None
        note_authentication(request.scope)
        return person


def is_same_origin(headers: Headers) -> bool:
    """Return whether, according to the browser, a page of this server sent the request.

    Assumes that the Host header was checked.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    scheme, _, host = headers.get("origin", "").partition("://")
    return scheme in ("http", "https") and host.lower() == headers["host"].lower()
