"""The application of `keel serve`: pages about the runs below a folder. It reads only: nothing can be sent to it."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from keel.config import ServeConfig
from keel.errors import CheckpointError, DataError
from keel.server.connections import welcome
from keel.server.limits import Refused, new_token
from keel.server.request_checks import Shield, Turns, accepted_hosts
from keel.server.sign_in import People
from keel.web.dashboard.folder import RunsBelow
from keel.web.dashboard.query_parameters import QueryParameters
from keel.web.dashboard.views import VIEWS, View, both_runs
from keel.web.pages import render_page, static

Endpoint = Callable[[Request], Awaitable[Response]]


class Dashboard:
    """The endpoints. What they show is in the files; here is only what was read of them."""

    def __init__(self, settings: ServeConfig, token: str) -> None:
        self.people = People({}, token, settings.port)
        self.secure = (settings.address or "").startswith("https")
        self.runs = RunsBelow(settings.folder)
        self.turns = Turns()

    async def enter(self, request: Request) -> Response:
        """The private link: the list of runs, and a cookie of this visit, which other sites cannot make use of."""
        token = request.query_params.get("token", "")
        if self.people.holder(token) is None:
            raise Refused(404, "There is no such link. keel serve prints a new one each time it starts.")
        answer, visit = render_page("runs.html", {}), f"{token}.{new_token()}"
        name = self.people.cookie(owner=True)
        answer.set_cookie(name, visit, httponly=True, samesite="strict", path="/", secure=self.secure)
        return answer

    async def list_page(self, request: Request) -> Response:
        self._visit(request)
        return render_page("runs.html", {})

    async def run_page(self, request: Request) -> Response:
        self._visit(request)
        run = await run_in_threadpool(self.runs.run, request.path_params["run"])
        return render_page("run.html", {"run": run})

    async def compare_page(self, request: Request) -> Response:
        self._visit(request)
        both = await run_in_threadpool(both_runs, self.runs, QueryParameters(request.query_params))
        return render_page("compare.html", {"runs": both})

    def endpoint(self, view: View) -> Endpoint:
        """A view as an endpoint: one request of a visit at a time, away from the event loop."""

        async def answer(request: Request) -> Response:
            asked = QueryParameters({**request.query_params, **request.path_params})
            async with self.turns.turn(self._visit(request)):
                return build_response(
                    await run_in_threadpool(view, self.runs, asked), request.headers.get("if-none-match", "")
                )

        return answer

    def _visit(self, request: Request) -> str:
        """Whose turn it is. Raises Refused for who has not come by the private link."""
        token, _, visit = request.cookies.get(self.people.cookie(owner=True), "").partition(".")
        if self.people.holder(token) is None:
            raise Refused(401, "Open the private link that keel serve printed.")
        welcome(request.scope)
        return visit


def build_response(found: Any, known: str = "") -> Response:
    """A file to be kept, or JSON; nothing where the reader has it already (`known`: tags of what they have)."""
    if isinstance(found, bytes):
        headers = {"Content-Disposition": 'attachment; filename="disputed.jsonl"'}
        return Response(found, headers=headers, media_type="application/x-ndjson")
    # ASCII: half of a surrogate pair, which a run may have logged, can travel no other way
    body = json.dumps(found, allow_nan=False, default=str)
    tag = f'"{hashlib.sha256(body.encode()).hexdigest()[:32]}"'
    if tag in (each.strip().removeprefix("W/") for each in known.split(",")):
        return Response(status_code=304, headers={"ETag": tag})
    return Response(body, headers={"ETag": tag}, media_type="application/json")


def dashboard_refusal(scope: Scope, refused: Refused) -> Response:
    """Scripts read .json; whoever asks for anything else reads a page."""
    if scope["path"].endswith(".json"):
        return refused.response()
    answer = render_page("runs_error.html", {"status": refused.status, "reason": refused.reason}, refused.status)
    answer.headers.update(refused.headers or {})
    return answer


async def handle_dashboard_error(request: Request, error: Exception) -> Response:
    """What went wrong, in words and as a status."""
    match error:
        case Refused():
            return dashboard_refusal(request.scope, error)
        case HTTPException():
            reason, headers = "There is no such page.", dict(error.headers or {})
            return dashboard_refusal(request.scope, Refused(error.status_code, reason, headers))
        case DataError() | CheckpointError() | OSError():
            return dashboard_refusal(
                request.scope, Refused(503, "A file of this run cannot be read just now.", {"Retry-After": "2"})
            )
        case _:
            return dashboard_refusal(request.scope, Refused(500, "keel failed; its terminal says why."))


def dashboard_app(settings: ServeConfig, token: str) -> ASGIApp:
    """The application, for whoever holds the token."""
    pages = Dashboard(settings, token)
    routes = [
        Route("/enter", pages.enter),
        Route("/", pages.list_page),
        Route("/run/{run}", pages.run_page),
        Route("/compare", pages.compare_page),
        Route("/static/{name}", static),
        *(Route(path, pages.endpoint(view)) for path, view in VIEWS.items()),
    ]
    kinds = (Refused, HTTPException, DataError, CheckpointError, OSError, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, handle_dashboard_error))
    app.router.redirect_slashes = False
    return Shield(
        app, accepted_hosts(settings.host, settings.names, settings.address, settings.port), dashboard_refusal
    )
