"""Read responses to be ranked: rows of `prompt, responses`, as `keel sample` writes them."""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256

from keel.data.rows import Content, Row, read_rows, reject, require, require_content

FEWEST, MOST = 2, 9  # responses of an item: raters select one with the number keys


@dataclass(frozen=True)
class UnrankedResponses:
    """Responses to one prompt, without a ranking."""

    prompt: Content
    responses: tuple[str, ...]
    source: str = ""  # origin of the responses; empty = unknown

    @property
    def key(self) -> str:
        """Hash of the prompt and of the responses in their order."""
        return sha256(json.dumps([self.prompt, self.responses], sort_keys=True).encode()).hexdigest()


def read_unranked_responses(path: str) -> list[UnrankedResponses]:
    """Read all rows of a file. Columns other than `prompt`, `responses` and `source` are ignored. Raises DataError."""
    return [parse_unranked_responses(row, path) for row in read_rows(path)]


def parse_unranked_responses(row: Row, path: str) -> UnrankedResponses:
    """Read the prompt and the responses of a row. Raises DataError with file and line."""
    prompt = require_content(row, path, "prompt")
    responses = require(row, path, "responses", (list,))
    if not FEWEST <= len(responses) <= MOST:
        reject(row, path, f'{len(responses)} in "responses"; give {FEWEST} to {MOST} responses')
    if not all(isinstance(response, str) for response in responses):
        reject(row, path, '"responses" has an entry that is not text')
    source = row.values.get("source")
    return UnrankedResponses(prompt, tuple(responses), source if isinstance(source, str) else "")


def in_pairs(rows: Iterable[UnrankedResponses], seed: int) -> Iterator[UnrankedResponses]:
    """Split rows into rows of two responses.

    More than two responses are shuffled and split into pairs; of an odd number, the last is paired with the first. The
    shuffle depends only on the seed and the row, so the same file gives the same pairs.
    """
    for row in rows:
        order = list(row.responses)
        if len(order) > 2:
            random.Random(f"{seed} {row.key}").shuffle(order)
        if len(order) % 2:
            order.append(order[0])
        yield from (replace(row, responses=(order[i], order[i + 1])) for i in range(0, len(order), 2))
