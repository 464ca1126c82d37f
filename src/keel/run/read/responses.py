"""The answers that a run kept (rollouts.jsonl): figures of all in memory, everything else read when asked for."""

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
"""Lowest and highest value, both included; None is no bound."""
TOGETHER = 500  # rows read and parsed at once
GAP = 50_000  # bytes between rows that are passed over by a read of its own


class ResponseLog:
    """N answers in the order of the file. A number is a place in that order, 0 to N - 1."""

    def __init__(self, path: str | Path, start: int = 0) -> None:
        """`start` is a byte: the line that it falls into, and all before, are passed over."""
        self.file = GrowingFile(path, _line_after(Path(path), start) if start else 0)
        self.index = Index.empty()
        self.broken = 0  # whole lines that are no answer
        self.is_whole = False  # whether all that was there at the last look has been read

    def __len__(self) -> int:
        return len(self.index.step)

    @property
    def step(self) -> Numbers:
        return self.index.step

    @property
    def score(self) -> NDArray[np.float64]:
        """nan where no score was given, or one that is not finite."""
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
        """Of each scorer: nan where it said nothing."""
        return self.index.scores

    def refresh(self, seconds: float = math.inf) -> bool:
        """Read what is new, whole lines only, for about so long; `is_whole` says whether that was enough.

        True when a resumed run had cut the file back: then all is read again.
        """
        cut = self.file.was_cut()
        if cut:
            self.file, self.index, self.broken = GrowingFile(self.file.path), Index.empty(), 0
        parts, end = [self.index], time.monotonic() + seconds
        self.is_whole = True
        for start, data in self.file.blocks():
            if len(parts) > 1 and time.monotonic() >= end:
                self.is_whole = False
                break
            part, broken = index_lines(data, start)
            parts.append(part)
            self.broken += broken
        if len(parts) > 1:
            self.index = join_indexes(parts)
        return cut

    def rows(self, numbers: Sequence[int] | Numbers) -> list[dict[str, Any]]:
        """Everything that the run kept of these answers; None for a number that is not finite. Raises DataError."""
        index, found = self.index, []
        with open_regular(self.file.path) as file:
            for number in numbers:
                file.seek(int(index.start[number]))
                try:
                    found.append(_row(file.read(int(index.size[number]))))
                except (ValueError, RecursionError) as error:
                    raise DataError("no answer here", f"{self.file.path}, byte {index.start[number]}") from error
        return found

    def texts(self, numbers: Sequence[int] | Numbers) -> Iterator[tuple[int, Any, str]]:
        """(number, prompt, response) of these answers, which must be in rising order."""
        begins, ends = self.index.text[numbers], self.index.text_end[numbers]
        if not len(begins):
            return
        with open_regular(self.file.path) as file:
            for first, last in _windows(begins, ends):
                file.seek(int(begins[first]))
                window = file.read(int(ends[last - 1] - begins[first]))
                places = zip(begins[first:last] - begins[first], ends[first:last] - begins[first], strict=True)
                rows = _parsed([window[begin:end] for begin, end in places])
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
        """Numbers of the answers within all of these, in the order of the file.

        `text` is looked for in prompt and answer, whatever its case; None and "" ask for nothing.
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
        """Those of these numbers, which rise, whose prompt or answer holds the text."""
        wanted = text.casefold()
        found = [
            number
            for number, prompt, response in self.texts(numbers)
            if wanted in response.casefold() or wanted in as_text(prompt).casefold()
        ]
        return np.array(found, dtype=np.int64)

    def same_prompt(self, other: "ResponseLog") -> list[tuple[Numbers, Numbers]]:
        """For each prompt that both runs answered: the numbers here and there, in the order of this file."""
        own, others = self.by_prompt(), other.by_prompt()
        return [(numbers, others[prompt]) for prompt, numbers in own.items() if prompt in others]

    def by_prompt(self) -> dict[int, Numbers]:
        """Numbers of the answers to each prompt, the prompt that came first in the file first."""
        prompts = self.index.prompt
        order = np.argsort(prompts, kind="stable")
        borders = np.flatnonzero(np.diff(prompts[order])) + 1
        groups = np.split(order, borders) if len(order) else []
        return {int(prompts[group[0]]): group for group in sorted(groups, key=lambda group: int(group[0]))}


def as_text(prompt: Any) -> str:
    """A prompt in words; a chat as `role: text` lines, whatever the file holds in its place as JSON."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return "\n".join(f"{message.get('role', '')}: {turn_text(message)}" for message in prompt)
    return json.dumps(prompt, ensure_ascii=False)


def _line_after(path: Path, start: int) -> int:
    """The first byte of the first line that begins at or after `start`."""
    with open_regular(path) as file:
        file.seek(start - 1)
        file.readline()
        return file.tell()


def _windows(begins: Numbers, ends: Numbers) -> Iterator[tuple[int, int]]:
    """Runs of rows that stand near each other in the file, and are read together: (first, last + 1)."""
    far = np.flatnonzero(begins[1:] - ends[:-1] > GAP) + 1
    borders = [0, *far.tolist(), len(begins)]
    for first, last in pairwise(borders):
        yield from ((at, min(at + TOGETHER, last)) for at in range(first, last, TOGETHER))


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line, parse_constant=lambda name: None, parse_float=_finite)
    if not isinstance(row, dict):
        raise ValueError("no object")
    return row


def _finite(text: str) -> float | None:
    value = float(text)
    return value if abs(value) < float("inf") else None


def _parsed(parts: list[bytes]) -> list[dict[str, Any]]:
    """The insides of JSON objects, parsed together: a call for each would take three times as long."""
    try:
        rows = list(json.loads(b"[{" + b"},{".join(parts) + b"}]"))
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == len(parts):
        return rows
    return [{}] if len(parts) == 1 else [row for part in parts for row in _parsed([part])]  # one of them is broken
