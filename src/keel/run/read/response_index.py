"""Metrics of responses, and the place of each in its file, without parsing more of a line than its beginning."""

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
    """Of N answers; places are bytes of the file."""

    step: Places  # [N]
    score: Column  # [N], nan where there is none, as in kl and scores
    kl: Column  # [N]
    length: Places  # [N]
    truncated: NDArray[np.bool_]  # [N]
    scores: Mapping[str, Column]  # scorer -> [N]
    start: Places  # [N], of the line
    size: Places  # [N], of the line
    text: Places  # [N], where prompt and response begin, the inside of a JSON object
    text_end: Places  # [N]
    prompt: Places  # [N], equal for equal prompts, in this process only

    @classmethod
    def empty(cls) -> Self:
        return cls.from_rows([], [], [])

    @classmethod
    def from_rows(
        cls, rows: Sequence[Mapping[str, Any]], spans: Sequence[tuple[int, ...]], prompts: Sequence[int]
    ) -> Self:
        """Rows with the short figures; start, size, text, text_end of each. Raises what a row without them raises."""
        places = np.array(spans, dtype=np.int64).reshape(-1, 4)
        own: list[Mapping[str, Any]] = [row["scores"] for row in rows]
        names = dict.fromkeys(name for scores in own for name in scores)
        return cls(
            np.array([row["step"] for row in rows], dtype=np.int64),
            _column([row["score"] for row in rows]),
            _column([row["kl"] for row in rows]),
            np.array([row["length"] for row in rows], dtype=np.int64),
            np.array([row["truncated"] for row in rows], dtype=bool),
            {name: _column([scores.get(name) for scores in own]) for name in names},
            places[:, 0],
            places[:, 1],
            places[:, 2],
            places[:, 3],
            np.array(prompts, dtype=np.int64),
        )


def index_lines(data: bytes, start: int) -> tuple[Index, int]:
    """Of whole lines whose first byte is byte `start` of the file; and how many of them are no answer."""
    try:
        return _by_beginnings(data, start), 0
    except NO_RESPONSE:
        return _line_by_line(data, start)


def join_indexes(parts: Sequence[Index]) -> Index:
    """One after the other."""
    names = dict.fromkeys(name for part in parts for name in part.scores)
    plain = [field for field in Index.__dataclass_fields__ if field != "scores"]
    columns: dict[str, Any] = {field: np.concatenate([getattr(part, field) for part in parts]) for field in plain}
    for part in parts:
        gap = np.full(len(part.step), np.nan)
        for name in names:
            columns.setdefault("scores", {}).setdefault(name, []).append(part.scores.get(name, gap))
    scores = {name: np.concatenate(pieces) for name, pieces in columns.pop("scores", {}).items()}
    return Index(**columns, scores=scores)


def _by_beginnings(data: bytes, start: int) -> Index:
    """Raises ValueError or KeyError unless every line is in the order of keel.run.rollout_line."""
    heads, spans, prompts, begin = [], [], [], 0
    while begin < len(data):
        parts = find_parts(data, begin)
        heads.append(data[begin : parts.short_end])
        spans.append((start + begin, parts.end - begin, start + parts.texts, start + parts.texts_end))
        prompts.append(hash(data[parts.prompt : parts.prompt_end]))
        begin = parts.end + 1
    rows = json.loads(b"[" + b"},".join(heads) + b"}]")
    if len(rows) != len(heads):
        raise ValueError("fields in another order")
    return Index.from_rows(rows, spans, prompts)


def _line_by_line(data: bytes, start: int) -> tuple[Index, int]:
    lines, found, begin = data.split(b"\n")[:-1], [], start
    for line in lines:
        with suppress(*NO_RESPONSE):
            row = json.loads(line)
            row.setdefault("scores", {})
            inside = (begin + line.index(b"{") + 1, begin + line.rindex(b"}"))
            prompt = hash(json.dumps(row["prompt"], ensure_ascii=False).encode("utf-8", "surrogatepass"))
            found.append(([row], [(begin, len(line), *inside)], [prompt]))
        begin += len(line) + 1
    with suppress(*NO_RESPONSE):
        columns = ([part for (part,) in parts] for parts in zip(*found, strict=True))
        return Index.from_rows(*columns), len(lines) - len(found)
    parts = [Index.empty()]
    for each in found:
        with suppress(*NO_RESPONSE):
            parts.append(Index.from_rows(*each))
    return join_indexes(parts), len(lines) + 1 - len(parts)


def _column(values: Sequence[Any]) -> Column:
    column = np.array(values, dtype=np.float64)  # null is nan
    return np.where(np.isfinite(column), column, np.nan)
