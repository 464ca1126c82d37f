"""The web application of `keel rank`: pages for raters and the owner, and the requests that submit and undo."""

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
from keel.server.request_checks import RequestQueues, Shield, accepted_hosts
from keel.server.sign_in import People, Person
from keel.terminal import print_line
from keel.web.pages import deal_values, refusal_response, render_page, serve_static
from keel.web.rank.study_metrics import store_metrics, store_metrics_in_subprocess

MAX_BODY = 64_000
FRESH_SECONDS = 2.0  # for which the owner's statistics are shown before they are computed again
MAX_IN_PROCESS = 500  # items or judgements; statistics of a larger study are computed in a separate process
RETRY_LATER = {"Retry-After": "5"}


class SubmittedRanking(BaseModel):
    """The body of a request that submits the judgement of a deal."""

    model_config = ConfigDict(strict=True, extra="forbid")
    deal: Annotated[str, Field(max_length=64)]
    ranks: Annotated[list[int | None], Field(max_length=MOST)] | None
    comment: Annotated[str, Field(max_length=4000)] = ""
    tags: list[str] = []
    seconds: float = 0.0


class RankPages:
    """The endpoints. All state is in the store, except for the links and the last statistics."""

    def __init__(self, store: Store, settings: RankConfig, instructions: str | None) -> None:
        self.store, self.settings, self.instructions = store, settings, instructions
        self.links = private_links(store, settings)
        self.people = People(store.tokens(), store.owner_token(), settings.port)
        self.queues = RequestQueues()
        self.stats: dict[str, Any] = {}
        self.stats_until = 0.0  # time.monotonic()
        self.stats_lock = asyncio.Lock()

    async def enter(self, request: Request) -> Response:
        """Sign a person in by the token of their private link, and welcome them.

        This is a page and not a redirect, because browsers do not send a strict cookie along with a navigation that
        began on another site.
        """
        token = request.query_params.get("token", "")
        person = self.people.holder(token)
        if person is None:
            raise Refused(404, "This link is not valid. Ask the owner of the study for yours.")
        owner = person.is_owner
        values = {
            "name": person.name or "owner",
            "owner": owner,
            "instructions": self.instructions,
            "mode": self.settings.mode,
            "progress": None if owner else await self._progress(person),
            "next": "/owner" if owner else "/rank",
        }
        response = render_page("enter.html", values)
        name, secure = self.people.cookie_name(owner), (self.settings.address or "").startswith("https")
        response.set_cookie(name, token, httponly=True, samesite="strict", path="/", secure=secure)
        return response

    async def rank(self, request: Request) -> Response:
        """Show the rater's open deal. A reload shows the same one."""
        rater = self.people.rater(request)
        if rater is None:
            raise Refused(401, "This page is for raters. Open your private link.")
        async with self.queues.turn(rater.name):
            deal = await run_in_threadpool(self.store.deal, rater.name)
            progress = await self._progress(rater)
        values = {"rater": rater.name, "progress": progress, "can_undo": progress["done"] > 0, "csrf": rater.csrf}
        if deal is None:
            return render_page("done.html", values)
        values |= {"tags": self.settings.tags, "instructions": self.instructions}
        return render_page("rank.html", values | deal_values(deal))

    async def submit_ranking(self, request: Request) -> Response:
        """Record a judgement. The reply is sent after it is on the disk."""
        rater, body = await self._read_post(request)
        submission = parse_submission(body)
        if not set(submission.tags) <= set(self.settings.tags):
            raise Refused(422, "This study has no such tag. Load the page again.")
        async with self.queues.turn(rater.name):
            await run_in_threadpool(self.store.record_judgement, rater.name, **submission.model_dump())
        return JSONResponse({"next": "/rank"})

    async def undo(self, request: Request) -> Response:
        """Withdraw the rater's last judgement, and deal its item to them again."""
        rater, _ = await self._read_post(request)
        async with self.queues.turn(rater.name):
            await run_in_threadpool(self.store.undo, rater.name)
        return JSONResponse({"next": "/rank"})

    async def owner(self, request: Request) -> Response:
        owner = self._owner(request)
        rows = [{"name": name or "owner", "link": link} for name, link in self.links.items()]
        return render_page("owner.html", {"stats": await self._fresh_stats(), "links": rows, "csrf": owner.csrf})

    async def stats_json(self, request: Request) -> Response:
        self._owner(request)
        return JSONResponse(await self._fresh_stats())

    async def _read_post(self, request: Request) -> tuple[Person, Any]:
        rater = self.people.sender(request)
        return rater, parse_body(await read_body(request, MAX_BODY))

    async def _progress(self, rater: Person) -> dict[str, Any]:
        return asdict(await run_in_threadpool(self.store.progress, rater.name))

    def _owner(self, request: Request) -> Person:
        owner = self.people.owner(request)
        if owner is None:
            raise Refused(401, "This page is for the owner. Open the owner's link.")
        return owner

    async def _fresh_stats(self) -> dict[str, Any]:
        """Return statistics that are at most a few seconds old.

        However often they are requested, computing them takes at most a tenth of the time, because raters come first.
        """
        async with self.stats_lock:
            began = time.monotonic()
            if began >= self.stats_until:
                self.stats = await run_in_threadpool(self._compute_stats)
                now = time.monotonic()
                self.stats_until = now + max(FRESH_SECONDS, 10 * (now - began))
        return self.stats

    def _compute_stats(self) -> dict[str, Any]:
        # A thread of this process that computes for long would hold the interpreter lock and delay the raters.
        if self.store.num_judgements() > MAX_IN_PROCESS or self.store.num_items() > MAX_IN_PROCESS:
            return store_metrics_in_subprocess(self.store.database.path)
        return store_metrics(self.store)


def parse_submission(body: Any) -> SubmittedRanking:
    """Validate the body of a submission. Raises Refused."""
    try:
        return SubmittedRanking.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise Refused(400, f"{where}: {first['msg']}" if where else first["msg"]) from None


def private_links(store: Store, settings: RankConfig) -> Mapping[str, str]:
    """Return the private link of each rater, and as the last entry, under the name "", the owner's."""
    host = as_url_host(next(iter(settings.names), settings.host))
    address = settings.address or f"http://{host}:{settings.port}"
    tokens = {**store.tokens(), "": store.owner_token()}
    return {name: f"{address}/enter?token={token}" for name, token in tokens.items()}


async def handle_rank_error(request: Request, error: Exception) -> Response:
    """Convert an exception to a response with a status and a reason."""
    match error:
        case Refused():
            return refusal_response(request.scope, error)
        case StoreError():
            print_line(str(error))
            reason = f"The store cannot be used at present: {error.what}."
            return refusal_response(request.scope, Refused(503, reason, RETRY_LATER))
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
            return refusal_response(request.scope, Refused(500, "keel failed. The reason is printed in its terminal."))
    return refusal_response(request.scope, Refused(status, str(error)))


def rank_app(store: Store, settings: RankConfig, instructions: str | None = None) -> ASGIApp:
    """Build the application. Raises StoreError if the store cannot be read."""
    pages = RankPages(store, settings, instructions)
    routes = [
        Route("/enter", pages.enter),
        Route("/rank", pages.rank),
        Route("/judgements", pages.submit_ranking, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
        Route("/owner", pages.owner),
        Route("/owner/stats.json", pages.stats_json),
        Route("/static/{name}", serve_static),
    ]
    handled = (Refused, StoreError, NotDealt, Conflict, DataError, HTTPException, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(handled, handle_rank_error))
    app.router.redirect_slashes = False
    return Shield(app, accepted_hosts(settings.host, settings.names, settings.address, settings.port), refusal_response)
