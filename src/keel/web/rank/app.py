"""The application of `keel rank`: pages for raters and the owner, and the two requests that change something."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from keel.config import RankConfig
from keel.data.items import MOST
from keel.errors import DataError
from keel.ranking.database import StoreError
from keel.ranking.deals import Conflict, NotDealt
from keel.ranking.store import Store
from keel.server.limits import Refused, as_url_host, parse_body, read_body
from keel.server.request_checks import Shield, Turns, accepted_hosts
from keel.server.sign_in import People, Person
from keel.terminal import tell
from keel.web.pages import of_deal, refusal_response, render_page, static
from keel.web.rank.study_metrics import store_metrics, store_metrics_in_subprocess

MAX_BODY = 64_000
FRESH_SECONDS = 2.0  # that the owner's figures serve before they are computed again
AT_ONCE = 500  # items, or rankings, of which the figures are worked out in this process
PATIENCE = {"Retry-After": "5"}


class SubmittedRanking(BaseModel):
    """What a page says of a deal."""

    model_config = ConfigDict(strict=True, extra="forbid")
    deal: Annotated[str, Field(max_length=64)]
    ranks: Annotated[list[int | None], Field(max_length=MOST)] | None
    comment: Annotated[str, Field(max_length=4000)] = ""
    tags: list[str] = []
    seconds: float = 0.0


class RankPages:
    """The endpoints. What they read and write is in the store; here are only the links and the last figures."""

    def __init__(self, store: Store, settings: RankConfig, instructions: str | None) -> None:
        self.store, self.settings, self.instructions = store, settings, instructions
        self.links = links(store, settings)
        self.people = People(store.tokens(), store.owner_token(), settings.port)
        self.turns = Turns()
        self.figures: dict[str, Any] = {}
        self.figures_until = 0.0
        self.counting = asyncio.Lock()

    async def enter(self, request: Request) -> Response:
        """The private link. No redirect: a strict cookie does not travel along from another site's link."""
        token = request.query_params.get("token", "")
        person = self.people.holder(token)
        if person is None:
            raise Refused(404, "There is no such link. Ask for yours again.")
        owner = person.is_owner
        values = {
            "name": person.name or "owner",
            "owner": owner,
            "instructions": self.instructions,
            "mode": self.settings.mode,
            "progress": None if owner else await self._progress(person),
            "next": "/owner" if owner else "/rank",
        }
        answer = render_page("enter.html", values)
        secure = (self.settings.address or "").startswith("https")
        answer.set_cookie(self.people.cookie(owner), token, httponly=True, samesite="strict", path="/", secure=secure)
        return answer

    async def rank(self, request: Request) -> Response:
        """The item that lies before the rater; loading it again shows the same one."""
        rater = self.people.rater(request)
        if rater is None:
            raise Refused(401, "This page is for raters. Open your private link.")
        async with self.turns.turn(rater.name):
            deal = await run_in_threadpool(self.store.deal, rater.name)
            progress = await self._progress(rater)
        values = {"rater": rater.name, "progress": progress, "can_undo": progress["done"] > 0, "csrf": rater.csrf}
        if deal is None:
            return render_page("done.html", values)
        values |= {"tags": self.settings.tags, "instructions": self.instructions}
        return render_page("rank.html", values | of_deal(deal))

    async def submit_ranking(self, request: Request) -> Response:
        """Answered when the ranking is on the disk."""
        rater, body = await self._sent(request)
        said = parse_submission(body)
        if not set(said.tags) <= set(self.settings.tags):
            raise Refused(422, "There is no such tag.")
        async with self.turns.turn(rater.name):
            await run_in_threadpool(self.store.record_judgement, rater.name, **said.model_dump())
        return JSONResponse({"next": "/rank"})

    async def undo(self, request: Request) -> Response:
        """Takes the rater's last ranking back, which then lies before them again."""
        rater, _ = await self._sent(request)
        async with self.turns.turn(rater.name):
            await run_in_threadpool(self.store.undo, rater.name)
        return JSONResponse({"next": "/rank"})

    async def owner(self, request: Request) -> Response:
        owner = self._owner(request)
        shown = [{"name": name or "owner", "link": link} for name, link in self.links.items()]
        return render_page("owner.html", {"stats": await self._stats(), "links": shown, "csrf": owner.csrf})

    async def stats(self, request: Request) -> Response:
        self._owner(request)
        return JSONResponse(await self._stats())

    async def _sent(self, request: Request) -> tuple[Person, Any]:
        rater = self.people.sender(request)
        return rater, parse_body(await read_body(request, MAX_BODY))

    async def _progress(self, rater: Person) -> dict[str, Any]:
        return asdict(await run_in_threadpool(self.store.progress, rater.name))

    def _owner(self, request: Request) -> Person:
        owner = self.people.owner(request)
        if owner is None:
            raise Refused(401, "This page is for the owner. Open the owner's link.")
        return owner

    async def _stats(self) -> dict[str, Any]:
        """Computed at most a tenth of the time, however often it is asked for: raters come first."""
        async with self.counting:
            began = time.monotonic()
            if began >= self.figures_until:
                self.figures = await run_in_threadpool(self._summary)
                now = time.monotonic()
                self.figures_until = now + max(FRESH_SECONDS, 10 * (now - began))
        return self.figures

    def _summary(self) -> dict[str, Any]:
        """Of a large study by a process of its own: while one here works out figures, no rater is served."""
        if self.store.num_judgements() > AT_ONCE or self.store.num_items() > AT_ONCE:
            return store_metrics_in_subprocess(self.store.database.path)
        return store_metrics(self.store)


def parse_submission(body: Any) -> SubmittedRanking:
    """Raises Refused for a body of another shape."""
    try:
        return SubmittedRanking.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise Refused(400, f"{where}: {first['msg']}" if where else first["msg"]) from None


def links(store: Store, settings: RankConfig) -> Mapping[str, str]:
    """The private link of each rater, and last, under the name "", the owner's."""
    host = as_url_host(next(iter(settings.names), settings.host))
    address = settings.address or f"http://{host}:{settings.port}"
    tokens = {**store.tokens(), "": store.owner_token()}
    return {name: f"{address}/enter?token={token}" for name, token in tokens.items()}


async def handle_rank_error(request: Request, error: Exception) -> Response:
    """What went wrong, in words and as a status."""
    match error:
        case Refused():
            return refusal_response(request.scope, error)
        case StoreError():
            tell(str(error))
            reason = f"The store cannot be used just now: {error.what}."
            return refusal_response(request.scope, Refused(503, reason, PATIENCE))
        case NotDealt():
            status = 404
        case Conflict():
            status = 409
        case DataError():
            status = 422
        case HTTPException():
            return refusal_response(
                request.scope, Refused(error.status_code, "There is no such page.", dict(error.headers or {}))
            )
        case _:
            return refusal_response(request.scope, Refused(500, "keel failed; its terminal says why."))
    return refusal_response(request.scope, Refused(status, str(error)))


def rank_app(store: Store, settings: RankConfig, instructions: str | None = None) -> ASGIApp:
    """The application. Raises StoreError when the store cannot be read."""
    pages = RankPages(store, settings, instructions)
    routes = [
        Route("/enter", pages.enter),
        Route("/rank", pages.rank),
        Route("/judgements", pages.submit_ranking, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
        Route("/owner", pages.owner),
        Route("/owner/stats.json", pages.stats),
        Route("/static/{name}", static),
    ]
    kinds = (Refused, StoreError, NotDealt, Conflict, DataError, HTTPException, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, handle_rank_error))
    app.router.redirect_slashes = False
    return Shield(app, accepted_hosts(settings.host, settings.names, settings.address, settings.port), refusal_response)
