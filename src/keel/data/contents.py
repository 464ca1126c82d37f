"""Read a data file for `keel data check`: to its end, past all faults.

A file has one of five purposes, decided by the columns of most rows: comparisons (any form of `keel.data.formats`),
responses to be ranked (`prompt, responses`), labelled responses (`prompt, completion, label`), texts to imitate
(`prompt, completion`, or `text`), or prompts. A row that the reader for the purpose refuses is broken.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from keel.data.formats import detect_form
from keel.data.items import parse_unranked_responses
from keel.data.labels import has_label, parse_label
from keel.data.messages import as_chat, learned_turns, plain_text
from keel.data.preferences import Ranking, parse_ranking
from keel.data.rows import (
    Content,
    Row,
    refuse_undesirable,
    require_content,
    require_messages,
    row_in_errors,
    row_kind,
    scan_rows,
)
from keel.errors import DataError


@dataclass(frozen=True)
class Entry:
    """A row that can be used."""

    number: int  # line of the file, from 1
    form: str
    prompt: Content | None  # None for a text without one
    responses: tuple[str, ...]
    ranking: Ranking | None = None  # only of comparisons
    label: bool | None = None  # only of labelled responses: whether it is desirable


@dataclass(frozen=True)
class Contents:
    """The rows of a file."""

    path: str
    purpose: str
    entries: list[Entry]
    broken: list[DataError]

    @property
    def rankings(self) -> list[Ranking]:
        return [entry.ranking for entry in self.entries if entry.ranking is not None]


def read_contents(path: str, split: str = "train", column: str = "prompt") -> Contents:
    """Read every row of a file, usable or broken.

    Args:
        column: Column that holds the prompt, in a file of prompts.

    Raises DataError if the file cannot be read at all, or has no row.
    """
    scanned = list(scan_rows(path, split))
    if not scanned:
        raise DataError("the file has no rows", where=path)
    rows = [row for row in scanned if isinstance(row, Row)]
    purposes = Counter(_purpose(row, column) for row in rows)
    purpose = purposes.most_common(1)[0][0] if purposes else "prompts"
    entries: list[Entry] = []
    broken: list[DataError] = []
    for row in scanned:
        try:
            if isinstance(row, DataError):
                raise row
            entries.append(READERS[purpose](row, path, column))
        except DataError as error:
            broken.append(error)
    return Contents(path, purpose, entries, broken)


def _purpose(row: Row, column: str) -> str:
    form = detect_form(row)
    if form == "rankings" and row.values.get("ranks") is None and row.values.get("scores") is None:
        return "answers"
    if form is not None:
        return "comparisons"
    if has_label(row):
        return "labels"
    if "completion" in row.values or (column not in row.values and row_kind(row) != "completion"):
        return "texts"
    return "prompts"


def _comparison(row: Row, path: str, column: str) -> Entry:
    ranking = parse_ranking(row, path)
    return Entry(row.number, detect_form(row) or "transcripts", ranking.prompt, ranking.responses, ranking)


def _unranked_responses(row: Row, path: str, column: str) -> Entry:
    responses = parse_unranked_responses(row, path)
    return Entry(row.number, "answers to be ranked", responses.prompt, responses.responses)


def _label(row: Row, path: str, column: str) -> Entry:
    labelled = parse_label(row, path)
    return Entry(row.number, "labelled responses", labelled.prompt, (labelled.response,), label=labelled.is_desirable)


def _text(row: Row, path: str, column: str) -> Entry:
    refuse_undesirable(row, path)
    kind = row_kind(row)
    if kind == "text":
        return Entry(row.number, "text", None, (str(require_content(row, path, "text")),))
    if kind == "completion":
        prompt = require_content(row, path, "prompt")
        completion = require_content(row, path, "completion", may_be_empty=True)
        if not isinstance(completion, str):
            with row_in_errors(row, path):
                learned_turns(as_chat(prompt), completion)
        return Entry(row.number, "prompt and completion", prompt, (plain_text(completion),))
    messages = require_messages(row, path, kind)
    with row_in_errors(row, path):
        turns = learned_turns([], messages)
    responses = tuple(messages[i]["content"] for i in turns)
    return Entry(row.number, "conversations", messages[: turns[0]], ("\n".join(responses),))


def _prompt(row: Row, path: str, column: str) -> Entry:
    return Entry(row.number, "prompts", require_content(row, path, column), ())


READERS: dict[str, Callable[[Row, str, str], Entry]] = {
    "comparisons": _comparison,
    "answers": _unranked_responses,
    "labels": _label,
    "texts": _text,
    "prompts": _prompt,
}
