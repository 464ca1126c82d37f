"""Templates and static files that the pages of `keel rank` and `keel serve` share. All text is escaped."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.types import Scope

from keel.data.rows import Content
from keel.data.turn_text import turn_text
from keel.ranking.deals import Deal
from keel.server.limits import Refused

HERE = Path(__file__).parent
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
FOLDERS = [*HERE.glob("**/static"), HERE.parent / "report" / "static"]
STATIC = {
    path.name: (path, MEDIA_TYPES[path.suffix])
    for folder in FOLDERS
    for path in folder.iterdir()
    if path.suffix in MEDIA_TYPES
}
"""Files that are served, by name. A request's path is looked up here, and never becomes a path on disk."""
ROLES = ("user", "assistant", "system")
CODE = re.compile(
    r"^(?P<fence>```|~~~).*?(?:^(?P=fence)[^\S\n]*$|\Z)|(?:^(?: {4}|\t)[^\n]*\n?)+|`[^`\n]+`", re.MULTILINE | re.DOTALL
)
"""Text in a monospaced font: fenced blocks (the last may lack its end), indented lines, and `inline code`."""

_templates = Environment(
    loader=FileSystemLoader([*HERE.glob("**/templates")]), autoescape=True, undefined=StrictUndefined
)


def split_code(text: str) -> list[tuple[bool, str]]:
    """Split a text into (is it code, characters). Joined, they are the text unchanged."""
    parts, end = [], 0
    for match in CODE.finditer(text):
        parts += [(False, text[end : match.start()]), (True, match[0])]
        end = match.end()
    return [part for part in (*parts, (False, text[end:])) if part[1]]


_templates.filters["split_code"] = split_code


def render_page(name: str, values: dict[str, Any], status: int = 200) -> HTMLResponse:
    return HTMLResponse(_templates.get_template(name).render(values), status)


async def serve_static(request: Request) -> Response:
    entry = STATIC.get(request.path_params["name"])
    if entry is None:
        raise Refused(404, "There is no such page.")
    path, media_type = entry
    # no-cache: the browser keeps the file, and asks each time whether it has changed.
    return FileResponse(path, media_type=media_type, headers={"Cache-Control": "no-cache"})


def refusal_response(scope: Scope, refused: Refused) -> Response:
    """Reply with JSON to scripts, which send POST or request .json, and with a page to everybody else."""
    if scope["method"] == "POST" or scope["path"].endswith(".json"):
        return refused.response()
    response = render_page("error.html", {"status": refused.status, "reason": refused.reason}, refused.status)
    response.headers.update(refused.headers or {})
    return response


def deal_values(deal: Deal) -> dict[str, Any]:
    """Return the template values of a deal. Everything is in the order shown."""
    previous = deal.previous
    responses = [deal.item.responses[i] for i in deal.shown]
    return {
        "deal": deal.id,
        "messages": page_turns(deal.item.prompt),
        "responses": responses,
        "same": [responses.index(response) for response in responses],  # the first response with the same text
        "previous": previous
        and {
            "ranks": None if previous.ranks is None else [previous.ranks[i] for i in deal.shown],
            "comment": previous.comment,
            "tags": list(previous.tags),
        },
    }


def page_turns(prompt: Content) -> list[dict[str, str]]:
    """Return the turns of a conversation with their roles. Plain text is one turn without a role."""
    if isinstance(prompt, str):
        return [{"role": "", "kind": "", "text": prompt}]
    return [_turn(str(message.get("role", "")) or "?", turn_text(message)) for message in prompt]


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "kind": role if role in ROLES else "other", "text": text}
