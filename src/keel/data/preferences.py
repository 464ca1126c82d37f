"""Human comparisons: pairs and rankings of answers to one prompt."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from keel.data.prompts import Content, Messages, Row, read_rows, reject, require, require_content
from keel.errors import DataError

ASSISTANT = "\n\nAssistant:"
"""Where the answer begins in a transcript without a column for the prompt (Anthropic's HH data)."""


@dataclass(frozen=True)
class Ranking:
    """Answers to one prompt and how a person ordered them. A pair is a ranking of two."""

    prompt: Content
    responses: tuple[str, ...]
    ranks: tuple[int | None, ...]  # of each response: 1 is best, equal numbers tie, None = not ranked
    margin: float = 0.0  # pairs only: by how much the chosen answer should be ahead

    @property
    def ranked(self) -> "Ranking":
        """Only what was ranked, best first (ties in the order of the file)."""
        order = sorted((rank, i) for i, rank in enumerate(self.ranks) if rank is not None)
        responses, ranks = tuple(self.responses[i] for _, i in order), tuple(rank for rank, _ in order)
        return replace(self, responses=responses, ranks=ranks)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) indices of every two responses that were told apart."""
        marks = [(i, rank) for i, rank in enumerate(self.ranks) if rank is not None]
        return [(i, j) for i, rank in marks for j, other in marks if rank < other]


def load_rankings(path: str, split: str = "train") -> list[Ranking]:
    """Rows of `chosen`, `rejected` (and `prompt`, `margin`), or of `prompt`, `responses` and `ranks` or `scores`.

    Raises DataError for a bad row, or when no row prefers anything (all tied, or fewer than two ranked).
    """
    rankings = [
        _ranking(row, path) if "responses" in row.values else _pair(row, path) for row in read_rows(path, split)
    ]
    if not any(ranking.pairs for ranking in rankings):
        raise DataError("no row prefers one answer to another", where=path)
    return rankings


def to_pairs(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Every two answers that were told apart, as a pair; ties and unranked answers give none."""
    return [
        Ranking(ranking.prompt, (ranking.responses[i], ranking.responses[j]), (1, 2), ranking.margin)
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


def _ranking(row: Row, path: str) -> Ranking:
    prompt = require_content(row, path, "prompt")
    responses = require(row, path, "responses", (list,))
    if len(responses) < 2 or not all(isinstance(response, str) for response in responses):
        reject(row, path, '"responses" is no list of at least two texts')
    by_rank = row.values.get("ranks") is not None
    if by_rank == (row.values.get("scores") is not None):
        reject(row, path, 'a ranking has either "ranks" (1 is best) or "scores" (higher is better)')
    column = "ranks" if by_rank else "scores"
    marks = require(row, path, column, (list,))
    if len(marks) != len(responses):
        reject(row, path, f'{len(marks)} "{column}" for {len(responses)} responses')
    if not all(mark is None or _is_mark(mark, by_rank) for mark in marks):
        reject(
            row, path, f'"{column}" holds something that is no {"rank from 1" if by_rank else "number"} and not null'
        )
    ranks = marks if by_rank else _ranks_of_scores(marks)
    return Ranking(prompt, tuple(responses), tuple(None if rank is None else int(rank) for rank in ranks))


def _is_mark(mark: Any, by_rank: bool) -> bool:
    if isinstance(mark, bool) or not isinstance(mark, int | float) or not math.isfinite(mark):
        return False
    return not by_rank or (mark >= 1 and mark == int(mark))


def _ranks_of_scores(scores: Sequence[float | None]) -> list[int | None]:
    """Equal scores share a rank."""
    levels = sorted({score for score in scores if score is not None}, reverse=True)
    return [None if score is None else levels.index(score) + 1 for score in scores]


def _pair(row: Row, path: str) -> Ranking:
    if "chosen" not in row.values and "rejected" not in row.values and "prompt" in row.values:
        reject(row, path, f'neither "chosen" and "rejected" nor "responses"; columns: {", ".join(row.values)}')
    chosen, rejected = (require_content(row, path, name, may_be_empty=True) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        reject(row, path, '"chosen" and "rejected" are of different kinds')
    if isinstance(chosen, str):
        prompt, answers = _text_pair(row, path, chosen, rejected)
    else:
        prompt, answers = _chat_pair(row, path, chosen, rejected)
    margin = 0.0
    if row.values.get("margin") is not None:
        margin = float(require(row, path, "margin", (int, float)))
        if not math.isfinite(margin):
            reject(row, path, f'"margin" is {margin}')
    return Ranking(prompt, answers, (1, 2), margin)


def _text_pair(row: Row, path: str, chosen: str, rejected: Any) -> tuple[Content, tuple[str, str]]:
    if "prompt" in row.values:
        return require_content(row, path, "prompt"), (chosen, rejected)
    cut = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    while cut >= len(ASSISTANT) and rejected[:cut] != chosen[:cut]:
        cut = chosen.rfind(ASSISTANT, 0, cut - 1) + len(ASSISTANT)
    if cut < len(ASSISTANT):
        reject(row, path, f'no "prompt", and "chosen" and "rejected" do not share a beginning up to {ASSISTANT!r}')
    return chosen[:cut], (chosen[cut:], rejected[cut:])


def _chat_pair(row: Row, path: str, chosen: Messages, rejected: Any) -> tuple[Content, tuple[str, str]]:
    """Answers as messages, with the prompt before them or in its own column."""
    whole = chosen[0]["role"] != "assistant"
    if whole:
        prompt: Messages = [a for a, b in zip(chosen[:-1], rejected[:-1], strict=False) if a == b]
    else:
        given = require_content(row, path, "prompt")
        prompt = [{"role": "user", "content": given}] if isinstance(given, str) else given
    answers = [messages[len(prompt) if whole else 0 :] for messages in (chosen, rejected)]
    if any(len(answer) != 1 or answer[0]["role"] != "assistant" for answer in answers):
        reject(row, path, '"chosen" and "rejected" must be one assistant message each, after the same messages')
    return prompt, (answers[0][0]["content"], answers[1][0]["content"])
