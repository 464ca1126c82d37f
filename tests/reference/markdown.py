"""Markdown from texts of the code: table rows, anchors and docstrings."""

import html
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence

SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Example):$")


def escape(text: str) -> str:
    """Escape what Markdown would read as markup. Text in backticks is code and stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if index % 2 else re.sub(r"([*<\[])", r"\\\1", part) for index, part in enumerate(parts))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. Cells are Markdown; only their `|` are escaped."""
    lines = [titles, ["---"] * len(titles), *([_escape_bars(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _escape_bars(cell: str) -> str:
    """Escape `|`. In code it becomes an entity, since GitHub needs a backslash there, which mkdocs would show."""
    code = re.sub(
        r"`([^`]*\|[^`]*)`",
        lambda match: f"<code>{html.escape(match[1], quote=False).replace('|', '&#124;')}</code>",
        cell,
    )
    return code.replace("|", "\\|")


def anchor(heading: str) -> str:
    """Return the anchor that mkdocs gives to a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def docstring_markdown(docstring: str) -> str:
    """Return a docstring as Markdown: paragraphs, lists of arguments, and indented blocks as code."""
    blocks = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(text for block in blocks for text in _block_markdown(block))


def _block_markdown(block: str) -> Iterator[str]:
    lines = block.splitlines()
    if lines and all(line.startswith("    ") for line in lines if line.strip()):
        yield f"```py\n{textwrap.dedent(block)}\n```"
        return
    plain: list[str] = []
    while lines:
        line = lines.pop(0)
        if not SECTION.match(line):
            plain.append(line)
            continue
        if plain:
            yield escape("\n".join(plain))
            plain = []
        body = []
        while lines and (lines[0].startswith(" ") or not lines[0]):
            body.append(lines.pop(0))
        yield f"**{line}**\n\n" + _entries(textwrap.dedent("\n".join(body)))
    if plain:
        yield escape("\n".join(plain))


def _entries(body: str) -> str:
    """Return the entries of `Args:` as a list. A line that is indented continues its entry."""
    entries: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    named = [re.sub(r"^(\*{0,2}\w+):", r"`\1`:", entry) for entry in entries]
    return "\n".join(f"- {escape(entry)}" for entry in named)
