"""Load responses that are labelled as desirable or undesirable, each on its own (`keel dpo --loss kto`)."""

from dataclasses import dataclass, field
from typing import Any

from keel.data.formats import detect_form, response_text
from keel.data.messages import as_chat
from keel.data.notes import Notes, note_mixed_kinds, remarks
from keel.data.preferences import Ranking, parse_ranking, read_row_tools, read_weight
from keel.data.rows import Content, Row, read_rows, reject, require_content

COLUMNS = ("completion", "response")
"""Columns that may hold the response: TRL's name, and that of keel."""
BOTH_WAYS = "a response that is better than as many others as it is worse than is left out"


@dataclass(frozen=True)
class LabelledResponse:
    """A response to a prompt, and whether it is desirable."""

    prompt: Content
    response: str
    is_desirable: bool
    weight: float = 1.0  # in the loss
    tools: list[Any] | None = field(default=None, compare=False)  # functions that the model may call
    place: str = field(default="", compare=False)  # FILE:LINE, for error messages


def has_label(row: Row) -> bool:
    """Whether a row has a `completion` or `response`, and a `label` that is true or false."""
    values = row.values
    return isinstance(values.get("label"), bool) and any(values.get(name) is not None for name in COLUMNS)


def load_labels(path: str, split: str = "train", notes: Notes | None = None) -> tuple[list[LabelledResponse], int]:
    """Load labelled responses, and the responses of comparisons as labelled ones. Also return how many were left out.

    Raises DataError for a bad row.
    """
    notes = notes if notes is not None else Notes()
    labels: list[LabelledResponse] = []
    num_left_out = 0
    for row in read_rows(path, split):
        if detect_form(row) is None:
            labels.append(parse_label(row, path))
            continue
        ranking = parse_ranking(row, path)
        of_row = labels_of_ranking(ranking)
        labels += of_row
        if len(of_row) < len(ranking.responses):
            num_left_out += len(ranking.responses) - len(of_row)
            notes.add(path, row.number, BOTH_WAYS)
    by_line = {int(label.place.rpartition(":")[2]): label.prompt for label in labels}
    for number, prompt in by_line.items():
        for remark in remarks(prompt) if not isinstance(prompt, str) else ():
            notes.add(path, number, remark)
    note_mixed_kinds(path, by_line, notes)
    return labels, num_left_out


def parse_label(row: Row, path: str) -> LabelledResponse:
    """Read a labelled response. Raises DataError with file and line."""
    column = next((name for name in COLUMNS if row.values.get(name) is not None), COLUMNS[0])
    prompt, response = require_content(row, path, "prompt"), require_content(row, path, column, may_be_empty=True)
    if not isinstance(row.values.get("label"), bool):
        reject(row, path, 'needs "label": true for a desirable response, false for an undesirable one')
    if isinstance(prompt, str) and not isinstance(response, str):
        prompt = as_chat(prompt)
    text = response_text(row, path, response, f'"{column}"')
    return LabelledResponse(
        prompt, text, row.values["label"], read_weight(row, path), read_row_tools(row, path), f"{path}:{row.number}"
    )


def labels_of_ranking(ranking: Ranking) -> list[LabelledResponse]:
    """Label a response as desirable if it is better than more of the others than it is worse than.

    Of a pair, the chosen response is desirable and the rejected one undesirable. A response that is better than as many
    as it is worse than has no label: the middle of three, all of a tie, and responses that are not ranked.
    """
    surplus = [0] * len(ranking.responses)
    for better, worse in ranking.pairs:
        surplus[better] += 1
        surplus[worse] -= 1
    return [
        LabelledResponse(ranking.prompt, text, count > 0, ranking.weight, ranking.tools, ranking.place)
        for text, count in zip(ranking.responses, surplus, strict=True)
        if count
    ]
