"""Load human comparisons: pairs and rankings of responses to one prompt."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from keel.data.chats import read_tools
from keel.data.formats import read_comparison
from keel.data.notes import Notes, note_mixed_kinds, remarks
from keel.data.rows import Content, Row, read_rows, reject, require
from keel.errors import DataError


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt and their order according to a rater. A pair is a ranking of two."""

    prompt: Content
    responses: tuple[str, ...]
    ranks: tuple[int | None, ...]  # of each response: 1 is best, equal ranks are a tie, None = not ranked
    margin: float = 0.0  # pairs only: smallest difference of the scores to aim for
    weight: float = 1.0  # in the loss and in every metric
    rater: str = ""  # name of the rater; empty = unknown
    source: str = ""  # origin of the responses; empty = unknown
    tools: list[Any] | None = field(default=None, compare=False)  # functions that the model may call
    place: str = field(default="", compare=False)  # FILE:LINE, for error messages

    @property
    def ranked(self) -> "Ranking":
        """The ranked responses only, best first; ties stay in the order of the file."""
        order = sorted((rank, i) for i, rank in enumerate(self.ranks) if rank is not None)
        responses, ranks = tuple(self.responses[i] for _, i in order), tuple(rank for rank, _ in order)
        return replace(self, responses=responses, ranks=ranks)

    @property
    def ties(self) -> list[tuple[int, int]]:
        """Index pairs of responses with the same rank."""
        marks = [(i, rank) for i, rank in enumerate(self.ranks) if rank is not None]
        return [(i, j) for n, (i, rank) in enumerate(marks, start=1) for j, other in marks[n:] if rank == other]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Index pairs (better, worse) of responses with different ranks."""
        marks = [(i, rank) for i, rank in enumerate(self.ranks) if rank is not None]
        return [(i, j) for i, rank in marks for j, other in marks if rank < other]

    @property
    def prefers_itself(self) -> bool:
        """Whether the better and the worse response are the same text in every pair."""
        return bool(self.pairs) and all(self.responses[i] == self.responses[j] for i, j in self.pairs)


def load_rankings(path: str, split: str = "train", notes: Notes | None = None) -> list[Ranking]:
    """Load rankings from rows in any format of `keel.data.formats`, with optional `weight`, `rater`, `source`, `tools`.

    Raises DataError for a bad row, or if no row prefers a response to a different one.
    """
    notes = notes if notes is not None else Notes()
    rows = read_rows(path, split)
    rankings = [parse_ranking(row, path) for row in rows]
    if not any(ranking.pairs for ranking in rankings):
        raise DataError("no row prefers one response to another", where=path)
    if all(ranking.prefers_itself for ranking in rankings if ranking.pairs):
        raise DataError("every row prefers a response to the same text, so there is nothing to learn", where=path)
    for row, ranking in zip(rows, rankings, strict=True):
        if ranking.prefers_itself:
            notes.add(path, row.number, "a response is preferred to the same text")
        if not isinstance(ranking.prompt, str):
            for remark in remarks(ranking.prompt):
                notes.add(path, row.number, remark)
    note_mixed_kinds(path, {row.number: ranking.prompt for row, ranking in zip(rows, rankings, strict=True)}, notes)
    return rankings


def parse_ranking(row: Row, path: str) -> Ranking:
    """Read the comparison of a row. Raises DataError with file and line."""
    comparison, weight = read_comparison(row, path), read_weight(row, path)
    texts = {name: row.values[name] for name in ("rater", "source") if isinstance(row.values.get(name), str)}
    tools = read_row_tools(row, path)
    return Ranking(*comparison, weight=weight, tools=tools, place=f"{path}:{row.number}", **texts)


def read_weight(row: Row, path: str) -> float:
    """Return the column `weight`, 1 if the row has none. Raises DataError."""
    if row.values.get("weight") is None:
        return 1.0
    weight = float(require(row, path, "weight", (int, float)))
    if not (math.isfinite(weight) and weight >= 0):
        reject(row, path, f'"weight" is {weight}; give a finite number from 0')
    return weight


def read_row_tools(row: Row, path: str) -> list[Any] | None:
    """Return the functions that the model may call in a row. Raises DataError with file and line."""
    try:
        return read_tools(row.values)
    except ValueError as error:
        reject(row, path, str(error))


def to_pairs(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Split rankings into pairs of responses with different ranks. Ties and unranked responses give no pair."""
    return [
        replace(ranking, responses=(ranking.responses[i], ranking.responses[j]), ranks=(1, 2))
        for ranking in rankings
        for i, j in ranking.pairs
    ]


RowT = TypeVar("RowT")


def split_by_prompt(
    rows: Sequence[RowT], prompt_of: Callable[[RowT], Content], fraction: float, seed: int
) -> tuple[list[RowT], list[RowT]]:
    """Split rows into training and held-out rows, so that no prompt is in both.

    Prompts are ordered by a hash of seed and prompt. The order of the rows has no influence, and added prompts do not
    reorder the others.

    Args:
        fraction: Share of the distinct prompts to hold out.

    Raises DataError if no prompt would remain for training.
    """
    keys = [prompt_key(prompt_of(row)) for row in rows]
    shuffled = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    num_held_out = math.ceil(fraction * len(shuffled))
    if num_held_out == len(shuffled):
        raise DataError(
            f"cannot hold out {num_held_out} of {len(shuffled)} distinct prompts",
            fix="give data.eval_path, set data.eval_fraction to 0, or add prompts",
        )
    held_out = set(shuffled[:num_held_out])
    return (
        [row for row, key in zip(rows, keys, strict=True) if key not in held_out],
        [row for row, key in zip(rows, keys, strict=True) if key in held_out],
    )


def prompt_key(prompt: Content) -> str:
    """Return the identity of a prompt: prompts that differ only in outer white space are the same."""
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
