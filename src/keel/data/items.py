"""Answers that wait to be ranked: rows of `prompt, responses`, as `keel sample` writes them."""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256

from keel.data.rows import Content, Row, read_rows, reject, require, require_content

FEWEST, MOST = 2, 9  # answers that a page can show, and number keys can name


@dataclass(frozen=True)
class UnrankedResponses:
    """Answers to one prompt that nobody has ranked yet."""

    prompt: Content
    responses: tuple[str, ...]
    source: str = ""  # where they come from, where that is known

    @property
    def key(self) -> str:
        """The same prompt with the same answers in the same order has the same key."""
        return sha256(json.dumps([self.prompt, self.responses], sort_keys=True).encode()).hexdigest()


def read_unranked_responses(path: str) -> list[UnrankedResponses]:
    """All rows of a file; columns other than `prompt`, `responses` and `source` are left alone. Raises DataError."""
    return [parse_unranked_responses(row, path) for row in read_rows(path)]


def parse_unranked_responses(row: Row, path: str) -> UnrankedResponses:
    """What a row holds. Raises DataError naming file and line."""
    prompt = require_content(row, path, "prompt")
    responses = require(row, path, "responses", (list,))
    if not FEWEST <= len(responses) <= MOST:
        reject(row, path, f'{len(responses)} in "responses"; people can rank {FEWEST} to {MOST}')
    if not all(isinstance(response, str) for response in responses):
        reject(row, path, '"responses" holds something that is no text')
    source = row.values.get("source")
    return UnrankedResponses(prompt, tuple(responses), source if isinstance(source, str) else "")


def in_pairs(rows: Iterable[UnrankedResponses], seed: int) -> Iterator[UnrankedResponses]:
    """Rows of two answers. More are shuffled and cut into twos; an odd one out meets the first again.

    The shuffle hangs on the seed and the row alone: the same file gives the same pairs.
    """
    for row in rows:
        order = list(row.responses)
        if len(order) > 2:
            random.Random(f"{seed} {row.key}").shuffle(order)
        if len(order) % 2:
            order.append(order[0])
        yield from (replace(row, responses=(order[i], order[i + 1])) for i in range(0, len(order), 2))
