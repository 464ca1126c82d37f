"""Metrics of logged responses and their positions in the file, from parsing only the beginning of each line."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from keel.run.rollout_line import find_parts

NO_RESPONSE = (ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError)
Column = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Index:
    """Metrics and file positions of N responses. Positions are bytes from the beginning of the file."""

    step: Places  # [N]
    score: Column  # [N]; nan where there is none, as in kl and scores
    kl: Column  # [N]
    length: Places  # [N]
    truncated: NDArray[np.bool_]  # [N]
    scores: Mapping[str, Column]  # scorer -> [N]
    start: Places  # [N], first byte of the line
    size: Places  # [N], bytes of the line
    text: Places  # [N], first byte of prompt and response, which are the inside of a JSON object
    text_end: Places  # [N]
    prompt: Places  # [N], a hash: equal for equal prompts, in this process only

    @classmethod
    def empty(cls) -> Self:
        return cls.from_rows([], [], [])

    @classmethod
    def from_rows(
        cls, rows: Sequence[Mapping[str, Any]], spans: Sequence[tuple[int, ...]], prompts: Sequence[int]
    ) -> Self:
        """Build the index of rows with their spans (start, size, text, text_end) and hashes of their prompts.

        Raises one of NO_RESPONSE for a row without the metrics.
        """
        positions = np.array(spans, dtype=np.int64).reshape(-1, 4)
        row_scores: list[Mapping[str, Any]] = [row["scores"] for row in rows]
        names = dict.fromkeys(name for scores in row_scores for name in scores)
        return cls(
            np.array([row["step"] for row in rows], dtype=np.int64),
            _column([row["score"] for row in rows]),
            _column([row["kl"] for row in rows]),
            np.array([row["length"] for row in rows], dtype=np.int64),
            np.array([row["truncated"] for row in rows], dtype=bool),
            {name: _column([scores.get(name) for scores in row_scores]) for name in names},
            positions[:, 0],
            positions[:, 1],
            positions[:, 2],
            positions[:, 3],
            np.array(prompts, dtype=np.int64),
        )


def index_lines(data: bytes, start: int) -> tuple[Index, int]:
    """Index complete lines, the first of which begins at byte `start` of the file.

    Returns the index and the number of lines that hold no response.
    """
    try:
        return _index_beginnings(data, start), 0
    except NO_RESPONSE:
        return _index_line_by_line(data, start)


def join_indexes(parts: Sequence[Index]) -> Index:
    """Concatenate indexes; a scorer that a part lacks gets nan there."""
    names = dict.fromkeys(name for part in parts for name in part.scores)
    plain = [field for field in Index.__dataclass_fields__ if field != "scores"]
    columns: dict[str, Any] = {field: np.concatenate([getattr(part, field) for part in parts]) for field in plain}
    for part in parts:
        gap = np.full(len(part.step), np.nan)
        for name in names:
            columns.setdefault("scores", {}).setdefault(name, []).append(part.scores.get(name, gap))
    scores = {name: np.concatenate(pieces) for name, pieces in columns.pop("scores", {}).items()}
    return Index(**columns, scores=scores)


def _index_beginnings(data: bytes, start: int) -> Index:
    """Index lines by their beginnings, parsed together.

    Raises ValueError or KeyError unless every line has the field order of keel.run.rollout_line.
    """
    heads, spans, prompts, begin = [], [], [], 0
    while begin < len(data):
        line = find_parts(data, begin)
        heads.append(data[begin : line.short_end])
        spans.append((start + begin, line.end - begin, start + line.texts, start + line.texts_end))
        prompts.append(hash(data[line.prompt : line.prompt_end]))
        begin = line.end + 1
    rows = json.loads(b"[" + b"},".join(heads) + b"}]")
    if len(rows) != len(heads):
        raise ValueError("a line has another field order")
    return Index.from_rows(rows, spans, prompts)


def _index_line_by_line(data: bytes, start: int) -> tuple[Index, int]:
    """Parse each line fully, and count those that hold no response."""
    lines, entries, begin = data.split(b"\n")[:-1], [], start
    for line in lines:
        with suppress(*NO_RESPONSE):
            row = json.loads(line)
            row.setdefault("scores", {})
            inside = (begin + line.index(b"{") + 1, begin + line.rindex(b"}"))
            prompt = hash(json.dumps(row["prompt"], ensure_ascii=False).encode("utf-8", "surrogatepass"))
            entries.append(([row], [(begin, len(line), *inside)], [prompt]))
        begin += len(line) + 1
    with suppress(*NO_RESPONSE):
        columns = ([item for (item,) in column] for column in zip(*entries, strict=True))
        return Index.from_rows(*columns), len(lines) - len(entries)
    # Some row is JSON but no response. Rows are indexed one by one to find which.
    indexes = [Index.empty()]
    for entry in entries:
        with suppress(*NO_RESPONSE):
            indexes.append(Index.from_rows(*entry))
    return join_indexes(indexes), len(lines) + 1 - len(indexes)


def _column(values: Sequence[Any]) -> Column:
    column = np.array(values, dtype=np.float64)  # turns null into nan
    return np.where(np.isfinite(column), column, np.nan)
