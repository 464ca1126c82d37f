"""The responses of one run, filtered, sorted and paged, also while the file is still being read."""

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
from keel.web.dashboard.disputes import scorer_disagreement
from keel.web.dashboard.file_gaps import FileGaps

NEWEST_BYTES = 4_000_000  # at the end of a long file, which are shown until the entire file is read
MAX_SECONDS = 0.4  # for which a request reads or searches; the next request continues
SEARCH_CHUNK = 2_000  # responses searched between two checks of the time
MAX_KEPT = 6  # results and searches that are kept in memory
SNIPPET = 240  # characters of a prompt and of a response in the list
SORTS = ("step", "score", "kl", "length", "disagreement")


@dataclass(frozen=True)
class ResponseQuery:
    """A filter and an order of responses."""

    score: Range = (None, None)
    kl: Range = (None, None)
    length: Range = (None, None)
    step: Range = (None, None)
    truncated: bool | None = None
    text: str = ""
    sort: str = "step"
    descending: bool = True
    until: int | None = None  # byte offset; responses that begin there or later were logged after the page was loaded


class TextSearch:
    """An incremental text search that begins with the newest responses."""

    def __init__(self, responses: ResponseLog, text: str) -> None:
        self.responses, self.text = responses, text
        self.low = self.high = len(responses)  # [low, high) has been searched
        self.matches: Numbers = np.array([], dtype=np.int64)  # ascending

    def advance(self, seconds: float) -> None:
        """Search all new responses, then older ones for about this many seconds."""
        end = time.monotonic() + seconds
        newer = np.arange(self.high, len(self.responses))
        self.matches = np.concatenate([self.matches, self.responses.with_text(newer, self.text)])
        self.high = len(self.responses)
        while self.low > 0:
            older = np.arange(max(0, self.low - SEARCH_CHUNK), self.low)
            self.matches = np.concatenate([self.responses.with_text(older, self.text), self.matches])
            self.low = int(older[0])
            if time.monotonic() >= end:
                return

    @property
    def progress(self) -> float:
        """Share of the responses that have been searched."""
        return (self.high - self.low) / max(self.high, 1)


class RunResponses:
    """The responses of a run. Of a long file, the newest are available first, and all once it is read to the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()  # callers of any method hold it; `gaps` may be read without it
        self.gaps = FileGaps()  # as of the last refresh
        self.all = ResponseLog(path)
        self.newest: ResponseLog | None = None  # the end of a long file, until `all` has read the entire file
        self.searches: OrderedDict[str, TextSearch] = OrderedDict()
        self.results: OrderedDict[ResponseQuery, Numbers] = OrderedDict()
        self._disagreement: tuple[Index, Column] | None = None  # and the index from which it was computed

    def refresh(self) -> None:
        """Read new responses for at most MAX_SECONDS."""
        self._read()
        self.gaps = FileGaps(self.all.broken, self.shown.is_complete and self.shown.file.is_torn)

    def _read(self) -> None:
        if self.newest is not None and self.newest.file.was_cut():
            self.newest = None
            self._clear_results()
        if self.newest is None and not self.all.is_complete and self._read_newest():
            return
        cut = self.all.refresh(MAX_SECONDS)
        if self.newest is not None and (cut or self.all.is_complete):
            self.newest, cut = None, True
        if self.newest is not None:
            self.newest.refresh()
        if cut:
            self._clear_results()

    def _clear_results(self) -> None:
        self.searches.clear()
        self.results.clear()

    def _read_newest(self) -> bool:
        """Read the end of a long file. Return whether the file is long."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size > 2 * NEWEST_BYTES:
            self.newest = ResponseLog(self.path, size - NEWEST_BYTES)
            self.newest.refresh()
        return self.newest is not None

    @property
    def shown(self) -> ResponseLog:
        """The responses that are available now."""
        return self.newest or self.all

    @property
    def read_share(self) -> float:
        """Share of the file that was read. Until it is 1, only the newest responses are available."""
        return 1.0 if self.newest is None else self.all.file.end / max(self.all.file.size, 1)

    def page(self, query: ResponseQuery, offset: int, limit: int) -> dict[str, Any]:
        """Return `limit` responses of a query from `offset`, with the numbers of responses and matches."""
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
            "read": self.read_share,
            "searched": searched,
            "scorers": list(index.scores),
            "ranges": {name: _range(getattr(index, name)) for name in ("step", "score", "kl", "length")},
            "offset": offset,
            "rows": self._rows(numbers[offset : offset + limit], query.sort == "disagreement"),
        }

    @property
    def score_disagreement(self) -> Column:
        """Disagreement of the scorers on each response. [N]"""
        if self._disagreement is None or self._disagreement[0] is not self.shown.index:
            self._disagreement = (self.shown.index, scorer_disagreement(self.shown.scores, len(self.shown)))
        return self._disagreement[1]

    def find_line(self, start: int) -> int:
        """Return the index of the response whose line begins at this byte. Raises Refused."""
        starts = self.shown.index.start
        number = int(np.searchsorted(starts, start))
        if number == len(starts) or starts[number] != start:
            raise Refused(404, "There is no such response (any more).")
        return number

    def matching(self, query: ResponseQuery) -> tuple[Numbers, float]:
        """Return the indices of matching responses in the order of the file, and the share that was searched."""
        numbers = self.shown.matching(query.score, query.kl, query.length, query.step, query.truncated)
        if query.until is not None:
            numbers = numbers[: int(np.searchsorted(self.shown.index.start[numbers], query.until))]
        if not query.text:
            return numbers, 1.0
        search = self.searches.pop(query.text, None) or TextSearch(self.shown, query.text)
        self.searches[query.text] = search
        _limit_size(self.searches)
        search.advance(MAX_SECONDS)
        return np.intersect1d(numbers, search.matches, assume_unique=True), search.progress

    def _ordered(self, query: ResponseQuery) -> tuple[Numbers, float]:
        kept = self.results.pop(query, None)
        if kept is not None:
            self.results[query] = kept
            return kept, 1.0
        numbers, searched = self.matching(query)
        if query.sort == "step":
            ordered = numbers[::-1] if query.descending else numbers
        else:
            index = self.shown.index
            if query.sort == "disagreement":
                keys = scorer_disagreement(index.scores, len(self.shown))
            else:
                keys = getattr(index, query.sort)
            # argsort places NaN last in both directions.
            ordered = numbers[np.argsort(-keys[numbers] if query.descending else keys[numbers], kind="stable")]
        if searched == 1.0 and self.newest is None:
            self.results[query] = ordered
            _limit_size(self.results)
        return ordered, searched

    def _rows(self, numbers: Numbers, with_disagreement: bool) -> list[dict[str, Any]]:
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
                "apart": round_value(self.score_disagreement[number]) if with_disagreement else None,
                "prompt": prompt_snippet(texts[number][0]),
                "response": texts[number][1][:SNIPPET],
            }
            for number in numbers.tolist()
        ]


def prompt_snippet(prompt: str) -> str:
    """Shorten a long prompt to its end, which usually holds the request."""
    return prompt if len(prompt) <= SNIPPET else f"… {prompt[-SNIPPET:]}"


def _range(values: Any) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [float(finite.min()), float(finite.max())] if len(finite) else None


def _limit_size(kept: OrderedDict[Any, Any]) -> None:
    """Drop the entries that were used longest ago."""
    while len(kept) > MAX_KEPT:
        kept.popitem(last=False)
