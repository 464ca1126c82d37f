"""The responses in rollouts.jsonl: their metrics are in memory, everything else is read on demand."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel.data.turn_text import turn_text
from keel.errors import DataError
from keel.files import open_regular
from keel.run.read.response_index import Index, index_lines, join_indexes
from keel.run.read.tail import GrowingFile

Numbers = NDArray[np.int64]
Range = tuple[float | None, float | None]
"""Lowest and highest value, both inclusive; None: no bound."""
TOGETHER = 500  # rows parsed together, which is three times as fast as one by one
GAP = 50_000  # bytes between rows, above which a new read begins


class ResponseLog:
    """N responses in the order of the file. A response's number is its position in that order, 0 to N - 1."""

    def __init__(self, path: str | Path, start: int = 0) -> None:
        """Open the log, skipping everything up to the end of the line that contains byte `start`."""
        self.file = GrowingFile(path, _line_after(Path(path), start) if start else 0)
        self.index = Index.empty()
        self.broken = 0  # complete lines without a response
        self.is_complete = False  # whether the last refresh read everything that the file had

    def __len__(self) -> int:
        return len(self.index.step)

    @property
    def step(self) -> Numbers:
        return self.index.step

    @property
    def score(self) -> NDArray[np.float64]:
        """Scores; nan where there is none, or one that is not finite."""
        return self.index.score

    @property
    def kl(self) -> NDArray[np.float64]:
        return self.index.kl

    @property
    def length(self) -> Numbers:
        return self.index.length

    @property
    def truncated(self) -> NDArray[np.bool_]:
        return self.index.truncated

    @property
    def scores(self) -> Mapping[str, NDArray[np.float64]]:
        """Name of each scorer -> its scores; nan where it gave none."""
        return self.index.scores

    def refresh(self, seconds: float = math.inf) -> bool:
        """Read new complete lines for about `seconds`; `is_complete` is whether that was enough.

        Returns True if a resumed run had truncated the file. Then everything is read again.
        """
        was_cut = self.file.was_cut()
        if was_cut:
            self.file, self.index, self.broken = GrowingFile(self.file.path), Index.empty(), 0
        indexes, end = [self.index], time.monotonic() + seconds
        self.is_complete = True
        for start, data in self.file.blocks():
            if len(indexes) > 1 and time.monotonic() >= end:
                self.is_complete = False
                break
            index, broken = index_lines(data, start)
            indexes.append(index)
            self.broken += broken
        if len(indexes) > 1:
            self.index = join_indexes(indexes)
        return was_cut

    def rows(self, numbers: Sequence[int] | Numbers) -> list[dict[str, Any]]:
        """Read the full rows of these responses; numbers that are not finite become None.

        Raises DataError where the file no longer has the row.
        """
        index, rows = self.index, []
        with open_regular(self.file.path) as file:
            for number in numbers:
                file.seek(int(index.start[number]))
                try:
                    rows.append(_parse_row(file.read(int(index.size[number]))))
                except (ValueError, RecursionError) as error:
                    where = f"{self.file.path}, byte {index.start[number]}"
                    raise DataError("this line holds no response; the file has changed", where) from error
        return rows

    def texts(self, numbers: Sequence[int] | Numbers) -> Iterator[tuple[int, Any, str]]:
        """Yield (number, prompt, response) of these responses, whose numbers must be in ascending order."""
        begins, ends = self.index.text[numbers], self.index.text_end[numbers]
        if not len(begins):
            return
        with open_regular(self.file.path) as file:
            for first, last in _windows(begins, ends):
                file.seek(int(begins[first]))
                window = file.read(int(ends[last - 1] - begins[first]))
                places = zip(begins[first:last] - begins[first], ends[first:last] - begins[first], strict=True)
                rows = _parse_together([window[begin:end] for begin, end in places])
                for number, row in zip(numbers[first:last], rows, strict=True):
                    yield int(number), row.get("prompt", ""), str(row.get("response", ""))

    def matching(
        self,
        score: Range = (None, None),
        kl: Range = (None, None),
        length: Range = (None, None),
        step: Range = (None, None),
        truncated: bool | None = None,
        text: str = "",
    ) -> Numbers:
        """Return the numbers of the responses that match all conditions, in the order of the file.

        `text` is searched in prompt and response, ignoring case. None and "" are no condition.
        """
        index = self.index
        fits = np.ones(len(index.step), dtype=bool)
        for values, (low, high) in ((index.score, score), (index.kl, kl), (index.length, length), (index.step, step)):
            if low is not None:
                fits &= values >= low
            if high is not None:
                fits &= values <= high
        if truncated is not None:
            fits &= index.truncated == truncated
        numbers = np.flatnonzero(fits)
        return self.with_text(numbers, text) if text else numbers

    def with_text(self, numbers: Numbers, text: str) -> Numbers:
        """Return those of the (ascending) numbers whose prompt or response contains the text, ignoring case."""
        wanted = text.casefold()
        matches = [
            number
            for number, prompt, response in self.texts(numbers)
            if wanted in response.casefold() or wanted in as_text(prompt).casefold()
        ]
        return np.array(matches, dtype=np.int64)

    def same_prompt(self, other: "ResponseLog") -> list[tuple[Numbers, Numbers]]:
        """Return (numbers here, numbers there) for each prompt of both runs, in the order of this file."""
        other_numbers = other.by_prompt()
        pairs = self.by_prompt().items()
        return [(numbers, other_numbers[prompt]) for prompt, numbers in pairs if prompt in other_numbers]

    def by_prompt(self) -> dict[int, Numbers]:
        """Return hash of each prompt -> numbers of its responses, in the order in which the prompts first occur."""
        prompts = self.index.prompt
        order = np.argsort(prompts, kind="stable")
        borders = np.flatnonzero(np.diff(prompts[order])) + 1
        groups = np.split(order, borders) if len(order) else []
        return {int(prompts[group[0]]): group for group in sorted(groups, key=lambda group: int(group[0]))}


def as_text(prompt: Any) -> str:
    """Return a prompt as text: a chat as `role: text` lines, any other value as JSON."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return "\n".join(f"{message.get('role', '')}: {turn_text(message)}" for message in prompt)
    return json.dumps(prompt, ensure_ascii=False)


def _line_after(path: Path, start: int) -> int:
    """Return the first byte of the first line that begins at or after `start`."""
    with open_regular(path) as file:
        file.seek(start - 1)
        file.readline()
        return file.tell()


def _windows(begins: Numbers, ends: Numbers) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of rows that are near each other in the file, to be read together."""
    gaps = np.flatnonzero(begins[1:] - ends[:-1] > GAP) + 1
    borders = [0, *gaps.tolist(), len(begins)]
    for first, last in pairwise(borders):
        yield from ((at, min(at + TOGETHER, last)) for at in range(first, last, TOGETHER))


def _parse_row(line: bytes) -> dict[str, Any]:
    row = json.loads(line, parse_constant=lambda name: None, parse_float=_parse_finite)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _parse_finite(text: str) -> float | None:
    value = float(text)
    return value if abs(value) < float("inf") else None


def _parse_together(insides: list[bytes]) -> list[dict[str, Any]]:
    """Parse the insides of JSON objects in one call, which takes a third of the time; {} for an invalid one."""
    try:
        rows = list(json.loads(b"[{" + b"},{".join(insides) + b"}]"))
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == len(insides):
        return rows
    # One of them is invalid, or holds "},{" that makes two objects of it.
    return [{}] if len(insides) == 1 else [row for inside in insides for row in _parse_together([inside])]
