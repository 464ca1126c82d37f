"""The answers of one run, as its page asks for them: filtered, sorted, page by page, while the file is still read."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keel.run.read.curves import round_value
from keel.run.read.response_index import Column, Index
from keel.run.read.responses import Numbers, Range, ResponseLog, as_text
from keel.server.limits import Refused
from keel.web.dashboard.disputes import disagreement

NEWEST = 4_000_000  # bytes at the end of a long file, which are shown until all of it is read
PATIENCE = 0.4  # seconds that a request reads or searches for; the next one continues
WINDOW = 2_000  # answers searched between two looks at the clock
KEPT = 6  # results, and searches, that are remembered
SNIPPET = 240  # characters of a prompt and of an answer in the list
SORTS = ("step", "score", "kl", "length", "disagreement")


@dataclass(frozen=True)
class Query:
    """Which answers, in which order. `until` is a byte of the file: what began there or later came after the page."""

    score: Range = (None, None)
    kl: Range = (None, None)
    length: Range = (None, None)
    step: Range = (None, None)
    truncated: bool | None = None
    text: str = ""
    sort: str = "step"
    descending: bool = True
    until: int | None = None


class Search:
    """Looks for a text in the newest answers first, a while at a time."""

    def __init__(self, responses: ResponseLog, text: str) -> None:
        self.answers, self.text = responses, text
        self.low = self.high = len(responses)  # [low, high) has been searched
        self.found: Numbers = np.array([], dtype=np.int64)

    def advance(self, seconds: float) -> None:
        """Through what is new, and older ones for about so long."""
        end = time.monotonic() + seconds
        newer = np.arange(self.high, len(self.answers))
        self.found = np.concatenate([self.found, self.answers.with_text(newer, self.text)])
        self.high = len(self.answers)
        while self.low > 0:
            older = np.arange(max(0, self.low - WINDOW), self.low)
            self.found = np.concatenate([self.answers.with_text(older, self.text), self.found])
            self.low = int(older[0])
            if time.monotonic() >= end:
                return

    @property
    def done(self) -> float:
        """Share of the answers that have been searched."""
        return (self.high - self.low) / max(self.high, 1)


class RunResponses:
    """The answers of a run. Of a long file the newest are there at once, and all when it has been read to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()  # whoever uses this holds it
        self.whole = ResponseLog(path)
        self.newest: ResponseLog | None = None
        self.searches: OrderedDict[str, Search] = OrderedDict()
        self.results: OrderedDict[Query, Numbers] = OrderedDict()
        self._apart: tuple[Index, Column] | None = None

    def refresh(self) -> None:
        """Read what is new for a while."""
        if self.newest is not None and self.newest.file.was_cut():
            self.newest = None
            self._forget_all()
        if self.newest is None and not self.whole.is_whole and self._show_newest():
            return
        cut = self.whole.refresh(PATIENCE)
        if self.newest is not None and (cut or self.whole.is_whole):
            self.newest, cut = None, True
        if self.newest is not None:
            self.newest.refresh()
        if cut:
            self._forget_all()

    def _forget_all(self) -> None:
        self.searches.clear()
        self.results.clear()

    def _show_newest(self) -> bool:
        """The end of a long file, at once."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size > 2 * NEWEST:
            self.newest = ResponseLog(self.path, size - NEWEST)
            self.newest.refresh()
        return self.newest is not None

    @property
    def shown(self) -> ResponseLog:
        return self.newest or self.whole

    @property
    def read(self) -> float:
        """Share of the file that has been read; until it is 1, the newest answers are shown."""
        return 1.0 if self.newest is None else self.whole.file.end / max(self.whole.file.size, 1)

    @property
    def broken(self) -> int:
        return self.whole.broken

    @property
    def is_torn(self) -> bool:
        """Whether the file ends in the middle of a line."""
        return self.shown.is_whole and self.shown.file.is_torn

    def page(self, query: Query, offset: int, limit: int) -> dict[str, Any]:
        """Some of the answers in the wanted order, and how many there are."""
        responses, index = self.shown, self.shown.index
        end = int(index.start[-1] + index.size[-1]) if len(responses) else 0
        until = end if query.until is None else query.until
        query = replace(query, until=until)
        numbers, searched = self._ordered(query)
        total = int(np.searchsorted(index.start, until))
        return {
            "until": until,
            "newer": len(responses) - total,
            "total": total,
            "matched": len(numbers),
            "read": self.read,
            "searched": searched,
            "scorers": list(index.scores),
            "ranges": {name: _range(getattr(index, name)) for name in ("step", "score", "kl", "length")},
            "offset": offset,
            "rows": self._rows(numbers[offset : offset + limit], query.sort == "disagreement"),
        }

    @property
    def score_disagreement(self) -> Column:
        """How far apart the scorers place each answer. [N]"""
        if self._apart is None or self._apart[0] is not self.shown.index:
            self._apart = (self.shown.index, disagreement(self.shown.scores, len(self.shown)))
        return self._apart[1]

    def find_line(self, start: int) -> int:
        """The number of the answer whose line begins with this byte. Raises Refused."""
        starts = self.shown.index.start
        number = int(np.searchsorted(starts, start))
        if number == len(starts) or starts[number] != start:
            raise Refused(404, "There is no such answer (any more).")
        return number

    def matching(self, query: Query) -> tuple[Numbers, float]:
        """Numbers in the order of the file, and the share of the answers that was searched for the text."""
        numbers = self.shown.matching(query.score, query.kl, query.length, query.step, query.truncated)
        if query.until is not None:
            numbers = numbers[: int(np.searchsorted(self.shown.index.start[numbers], query.until))]
        if not query.text:
            return numbers, 1.0
        search = self.searches.pop(query.text, None) or Search(self.shown, query.text)
        self.searches[query.text] = search
        _forget(self.searches)
        search.advance(PATIENCE)
        return np.intersect1d(numbers, search.found, assume_unique=True), search.done

    def _ordered(self, query: Query) -> tuple[Numbers, float]:
        known = self.results.pop(query, None)
        if known is not None:
            self.results[query] = known
            return known, 1.0
        numbers, searched = self.matching(query)
        if query.sort == "step":
            ordered = numbers[::-1] if query.descending else numbers
        else:
            index = self.shown.index
            key = (
                disagreement(index.scores, len(self.shown))
                if query.sort == "disagreement"
                else getattr(index, query.sort)
            )
            ordered = numbers[
                np.argsort(-key[numbers] if query.descending else key[numbers], kind="stable")
            ]  # nan last
        if searched == 1.0 and self.newest is None:
            self.results[query] = ordered
            _forget(self.results)
        return ordered, searched

    def _rows(self, numbers: Numbers, with_apart: bool) -> list[dict[str, Any]]:
        responses = self.shown
        texts = {number: (as_text(prompt), response) for number, prompt, response in responses.texts(np.sort(numbers))}
        return [
            {
                "at": int(responses.index.start[number]),
                "step": int(responses.step[number]),
                "score": round_value(responses.score[number]),
                "kl": round_value(responses.kl[number]),
                "length": int(responses.length[number]),
                "truncated": bool(responses.truncated[number]),
                "apart": round_value(self.score_disagreement[number]) if with_apart else None,
                "prompt": prompt_snippet(texts[number][0]),
                "response": texts[number][1][:SNIPPET],
            }
            for number in numbers.tolist()
        ]


def prompt_snippet(prompt: str) -> str:
    """Where a long prompt says what it wants."""
    return prompt if len(prompt) <= SNIPPET else f"… {prompt[-SNIPPET:]}"


def _range(values: Any) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [float(finite.min()), float(finite.max())] if len(finite) else None


def _forget(kept: OrderedDict[Any, Any]) -> None:
    """What was not asked for of late."""
    while len(kept) > KEPT:
        kept.popitem(last=False)
