"""Who is asking: each rater, and the owner, is known by the token in their private link, then by a cookie."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request

from keel.server.connections import welcome
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
        """What a page must send back: no other site can know it, and it does not tell the token."""
        return hmac.new(self.token.encode(), b"keel rank", hashlib.sha256).hexdigest()


class People:
    """Everybody who has a link. Tokens are compared in a time that does not tell how much of one was right."""

    def __init__(self, raters: Mapping[str, str], owner_token: str, port: int) -> None:
        self.people = [Person("", owner_token), *(Person(name, token) for name, token in raters.items())]
        self.port = port

    def holder(self, token: str) -> Person | None:
        """Whose token this is."""
        found = [person for person in self.people if hmac.compare_digest(person.token.encode(), token.encode())]
        return found[0] if found else None

    def cookie(self, owner: bool) -> str:
        """Its name: ports share cookies, and one browser may hold the owner's and a rater's page."""
        return f"keel-owner-{self.port}" if owner else f"keel-{self.port}"

    def rater(self, request: Request) -> Person | None:
        return self._from_cookie(request, owner=False)

    def owner(self, request: Request) -> Person | None:
        return self._from_cookie(request, owner=True)

    def sender(self, request: Request) -> Person:
        """The rater whose own page sent this. Raises Refused."""
        rater = self.rater(request)
        if rater is None:
            raise Refused(403, "open your private link first")
        if not is_same_origin(request.headers):
            raise Refused(403, "only a page of this server may send this")
        if not hmac.compare_digest(rater.csrf.encode(), request.headers.get(TOKEN_HEADER, "").encode()):
            raise Refused(403, "this page is not yours any more: load it again")
        return rater

    def _from_cookie(self, request: Request, owner: bool) -> Person | None:
        person = self.holder(request.cookies.get(self.cookie(owner), ""))
        if person is None or person.is_owner != owner:
            return None
        welcome(request.scope)
        return person


def is_same_origin(headers: Headers) -> bool:
    """Whether the browser says that a page of this server sent the request (the Host header was checked before)."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    scheme, _, host = headers.get("origin", "").partition("://")
    return scheme in ("http", "https") and host.lower() == headers["host"].lower()
