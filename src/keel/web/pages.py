"""What the pages show. Text is text: the templates escape all of it."""

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
KINDS = {".css": "text/css", ".js": "text/javascript"}
FOLDERS = [*HERE.glob("**/static"), HERE.parent / "report" / "static"]
STATIC = {path.name: (path, KINDS[path.suffix]) for at in FOLDERS for path in at.iterdir() if path.suffix in KINDS}
"""The files that can be asked for, by name: a request's path never becomes a path of the disk."""
ROLES = ("user", "assistant", "system")
CODE = re.compile(
    r"^(?P<fence>```|~~~).*?(?:^(?P=fence)[^\S\n]*$|\Z)|(?:^(?: {4}|\t)[^\n]*\n?)+|`[^`\n]+`", re.MULTILINE | re.DOTALL
)
"""What is set in a monospaced font: blocks between fences (the last may lack its end), indented lines, `words`."""

_templates = Environment(
    loader=FileSystemLoader([*HERE.glob("**/templates")]), autoescape=True, undefined=StrictUndefined
)


def code_parts(text: str) -> list[tuple[bool, str]]:
    """The same text, character for character, in parts: (whether it is code, characters)."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts += [(False, text[end : found.start()]), (True, found[0])]
        end = found.end()
    return [part for part in (*parts, (False, text[end:])) if part[1]]


_templates.filters["code_parts"] = code_parts


def render_page(name: str, values: dict[str, Any], status: int = 200) -> HTMLResponse:
    return HTMLResponse(_templates.get_template(name).render(values), status)


async def static(request: Request) -> Response:
    """A file of the table."""
    found = STATIC.get(request.path_params["name"])
    if found is None:
        raise Refused(404, "There is no such page.")
    path, kind = found
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})  # kept, and asked after


def refusal_response(scope: Scope, refused: Refused) -> Response:
    """Scripts send POST and read .json; whoever asks for anything else reads a page."""
    if scope["method"] == "POST" or scope["path"].endswith(".json"):
        return refused.response()
    answer = render_page("error.html", {"status": refused.status, "reason": refused.reason}, refused.status)
    answer.headers.update(refused.headers or {})
    return answer


def of_deal(deal: Deal) -> dict[str, Any]:
    """An item as its rater sees it: everything in the order shown."""
    said = deal.previous
    return {
        "deal": deal.id,
        "messages": page_turns(deal.item.prompt),
        "answers": (responses := [deal.item.responses[i] for i in deal.shown]),
        "same": [responses.index(answer) for answer in responses],
        "previous": said
        and {
            "ranks": None if said.ranks is None else [said.ranks[i] for i in deal.shown],
            "comment": said.comment,
            "tags": list(said.tags),
        },
    }


def page_turns(prompt: Content) -> list[dict[str, str]]:
    """A conversation, each turn under its role, whatever that is called; plain text is one message without a role."""
    if isinstance(prompt, str):
        return [{"role": "", "kind": "", "text": prompt}]
    return [_turn(str(message.get("role", "")) or "?", turn_text(message)) for message in prompt]


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "kind": role if role in ROLES else "other", "text": text}
