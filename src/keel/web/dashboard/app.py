"""The web application of `keel serve`: pages about the runs below a folder. No request changes anything."""

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
from keel.server.connections import note_authentication
from keel.server.limits import Refused, new_token
from keel.server.request_checks import RequestQueues, Shield, accepted_hosts
from keel.server.sign_in import People
from keel.web.dashboard.folder import RunsBelow
from keel.web.dashboard.query_parameters import QueryParameters
from keel.web.dashboard.views import VIEWS, View, both_runs
from keel.web.pages import render_page, serve_static

Endpoint = Callable[[Request], Awaitable[Response]]


class Dashboard:
    """The endpoints. All state is in the files of the runs; this holds only what was read from them."""

    def __init__(self, settings: ServeConfig, token: str) -> None:
        self.people = People({}, token, settings.port)
        self.secure = (settings.address or "").startswith("https")
        self.runs = RunsBelow(settings.folder)
        self.queues = RequestQueues()

    async def enter(self, request: Request) -> Response:
        """Sign a visitor in by the token of the private link, and show the list of runs.

        Each visit gets a different cookie, by which its requests are queued. The cookie is strict: browsers do not
        send it with requests from other sites.
        """
        token = request.query_params.get("token", "")
        if self.people.holder(token) is None:
            raise Refused(404, "This link is not valid. keel serve prints a new one each time it starts.")
        response, visit = render_page("runs.html", {}), f"{token}.{new_token()}"
        name = self.people.cookie_name(owner=True)
        response.set_cookie(name, visit, httponly=True, samesite="strict", path="/", secure=self.secure)
        return response

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
        """Convert a view to an endpoint that runs it in a thread, one request of a visit at a time."""

        async def run_view(request: Request) -> Response:
            parameters = QueryParameters({**request.query_params, **request.path_params})
            async with self.queues.turn(self._visit(request)):
                result = await run_in_threadpool(view, self.runs, parameters)
                return build_response(result, request.headers.get("if-none-match", ""))

        return run_view

    def _visit(self, request: Request) -> str:
        """Return the id of the visit. Raises Refused for a client that did not open the private link."""
        token, _, visit = request.cookies.get(self.people.cookie_name(owner=True), "").partition(".")
        if self.people.holder(token) is None:
            raise Refused(401, "Open the private link that keel serve printed.")
        note_authentication(request.scope)
        return visit


def build_response(result: Any, known_tags: str = "") -> Response:
    """Convert the result of a view to a response.

    Args:
        result: Bytes for a file to download, anything else for JSON.
        known_tags: The If-None-Match header. If it holds the tag of the result, the response is 304 without a body.
    """
    if isinstance(result, bytes):
        headers = {"Content-Disposition": 'attachment; filename="disputed.jsonl"'}
        return Response(result, headers=headers, media_type="application/x-ndjson")
    # ASCII with escapes, because UTF-8 cannot encode half of a surrogate pair, which a run may have logged.
    body = json.dumps(result, allow_nan=False, default=str)
    tag = f'"{hashlib.sha256(body.encode()).hexdigest()[:32]}"'
    if tag in (each.strip().removeprefix("W/") for each in known_tags.split(",")):
        return Response(status_code=304, headers={"ETag": tag})
    return Response(body, headers={"ETag": tag}, media_type="application/json")


def dashboard_refusal(scope: Scope, refused: Refused) -> Response:
    """Reply with JSON to scripts, which request .json, and with a page to everybody else."""
    if scope["path"].endswith(".json"):
        return refused.response()
    response = render_page("runs_error.html", {"status": refused.status, "reason": refused.reason}, refused.status)
    response.headers.update(refused.headers or {})
    return response


async def handle_dashboard_error(request: Request, error: Exception) -> Response:
    """Convert an exception to a response with a status and a reason."""
    match error:
        case Refused():
            return dashboard_refusal(request.scope, error)
        case HTTPException():
            reason, headers = "There is no such page.", dict(error.headers or {})
            return dashboard_refusal(request.scope, Refused(error.status_code, reason, headers))
        case DataError() | CheckpointError() | OSError():
            reason = "A file of this run cannot be read at present."
            return dashboard_refusal(request.scope, Refused(503, reason, {"Retry-After": "2"}))
        case _:
            return dashboard_refusal(request.scope, Refused(500, "keel failed. The reason is printed in its terminal."))


def dashboard_app(settings: ServeConfig, token: str) -> ASGIApp:
    """Build the application. Visitors sign in with the token."""
    pages = Dashboard(settings, token)
    routes = [
        Route("/enter", pages.enter),
        Route("/", pages.list_page),
        Route("/run/{run}", pages.run_page),
        Route("/compare", pages.compare_page),
        Route("/static/{name}", serve_static),
        *(Route(path, pages.endpoint(view)) for path, view in VIEWS.items()),
    ]
    handled = (Refused, HTTPException, DataError, CheckpointError, OSError, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(handled, handle_dashboard_error))
    app.router.redirect_slashes = False
    return Shield(
        app, accepted_hosts(settings.host, settings.names, settings.address, settings.port), dashboard_refusal
    )
