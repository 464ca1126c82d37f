"""Human comparisons: pairs and rankings of answers to one prompt."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from keel.data.chats import read_tools
from keel.data.formats import read_comparison
from keel.data.notes import Notes, note_kinds, remarks
from keel.data.rows import Content, Row, read_rows, reject, require
from keel.errors import DataError


@dataclass(frozen=True)
class Ranking:
    """Answers to one prompt and how a person ordered them. A pair is a ranking of two."""

    prompt: Content
    responses: tuple[str, ...]
    ranks: tuple[int | None, ...]  # of each response: 1 is best, equal numbers tie, None = not ranked
    margin: float = 0.0  # pairs only: by how much the chosen answer should be ahead
    weight: float = 1.0  # how much it counts in the loss and in every figure
    rater: str = ""  # who made it, where that is known
    source: str = ""  # where the answers come from, where that is known
    tools: list[Any] | None = field(default=None, compare=False)  # functions that the model may call
    place: str = field(default="", compare=False)  # FILE:LINE, for errors

    @property
    def ranked(self) -> "Ranking":
        """Only what was ranked, best first (ties in the order of the file)."""
        order = sorted((rank, i) for i, rank in enumerate(self.ranks) if rank is not None)
        responses, ranks = tuple(self.responses[i] for _, i in order), tuple(rank for rank, _ in order)
        return replace(self, responses=responses, ranks=ranks)

    @property
    def ties(self) -> list[tuple[int, int]]:
        """Indices of every two responses with the same rank."""
        marks = [(i, rank) for i, rank in enumerate(self.ranks) if rank is not None]
        return [(i, j) for place, (i, rank) in enumerate(marks) for j, other in marks[place + 1 :] if rank == other]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) indices of every two responses that were told apart."""
        marks = [(i, rank) for i, rank in enumerate(self.ranks) if rank is not None]
        return [(i, j) for i, rank in marks for j, other in marks if rank < other]

    @property
    def prefers_itself(self) -> bool:
        """Whether all that it prefers to one another is the same text."""
        return bool(self.pairs) and all(self.responses[i] == self.responses[j] for i, j in self.pairs)


def load_rankings(path: str, split: str = "train", notes: Notes | None = None) -> list[Ranking]:
    """Rows in any of the forms of `keel.data.formats`; each may have `weight`, `rater`, `source` and `tools`.

    Raises DataError for a bad row, or when no row prefers anything (all tied, all the same, or fewer than two ranked).
    """
    notes = notes if notes is not None else Notes()
    rows = read_rows(path, split)
    rankings = [parse_ranking(row, path) for row in rows]
    if not any(ranking.pairs for ranking in rankings):
        raise DataError("no row prefers one answer to another", where=path)
    if all(ranking.prefers_itself for ranking in rankings if ranking.pairs):
        raise DataError("every row prefers an answer to the same text, so there is nothing to learn", where=path)
    for row, ranking in zip(rows, rankings, strict=True):
        if ranking.prefers_itself:
            notes.add(path, row.number, "an answer is preferred to the same text")
        if not isinstance(ranking.prompt, str):
            for remark in remarks(ranking.prompt):
                notes.add(path, row.number, remark)
    note_kinds(path, {row.number: ranking.prompt for row, ranking in zip(rows, rankings, strict=True)}, notes)
    return rankings


def parse_ranking(row: Row, path: str) -> Ranking:
    """The comparison that a row holds. Raises DataError naming file and line."""
    comparison = read_comparison(row, path)
    weight = 1.0
    if row.values.get("weight") is not None:
        weight = float(require(row, path, "weight", (int, float)))
        if not (math.isfinite(weight) and weight >= 0):
            reject(row, path, f'"weight" is {weight}')
    names = {name: require(row, path, name) for name in ("rater", "source") if isinstance(row.values.get(name), str)}
    try:
        tools = read_tools(row.values)
    except ValueError as error:
        reject(row, path, str(error))
    return Ranking(*comparison, weight=weight, tools=tools, place=f"{path}:{row.number}", **names)


def to_pairs(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Every two answers that were told apart, as a pair; ties and unranked answers give none."""
    return [
        replace(ranking, responses=(ranking.responses[i], ranking.responses[j]), ranks=(1, 2))
        for ranking in rankings
        for i, j in ranking.pairs
    ]


RowT = TypeVar("RowT")


def split_by_prompt(
    rows: Sequence[RowT], prompt_of: Callable[[RowT], Content], fraction: float, seed: int
) -> tuple[list[RowT], list[RowT]]:
    """Rows to learn from and held-out rows, `fraction` of the distinct prompts: no prompt is on both sides.

    The order of the file has no influence, and a prompt keeps its place in the drawing when others are added.
    Raises DataError when a side would be empty.
    """
    keys = [prompt_key(prompt_of(row)) for row in rows]
    drawn = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    num_held_out = math.ceil(fraction * len(drawn))
    if num_held_out == len(drawn):
        raise DataError(
            f"cannot hold out {num_held_out} of {len(drawn)} distinct prompts",
            fix="give data.eval_path, set data.eval_fraction to 0, or add prompts",
        )
    held_out = set(drawn[:num_held_out])
    sides = [key in held_out for key in keys]
    return (
        [row for row, held in zip(rows, sides, strict=True) if not held],
        [row for row, held in zip(rows, sides, strict=True) if held],
    )


def prompt_key(prompt: Content) -> str:
    """Prompts that differ only in outer white space are one prompt."""
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
