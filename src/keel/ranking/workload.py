"""What is left to rank, kept in memory beside a store: which item a rater gets next, and how far each one is.

A page costs a few passes of `bytearray.find` over one byte an item, whatever has been ranked before.
"""

import sqlite3
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from keel.ranking.deals import Progress

DONE = 255  # in place of a count: this rater has judged the item
MOST_COUNTED = 254
KEPT = 200  # raters whose view is kept


class View:
    """The items as one rater has them."""

    def __init__(self, counts: bytearray, places: Sequence[int], seconds: Sequence[float], overlap: int) -> None:
        self.counts = bytearray(counts)  # [I], judgements of each item that stand, or DONE
        for place in places:
            self.counts[place] = DONE
        self.left = sum(map(self.counts.count, range(overlap)))  # items that still need judgements, of this rater too
        self.seconds = sorted(seconds)  # of each judgement of this rater

    def set(self, place: int, count: int, overlap: int) -> None:
        self.left += (count < overlap) - (self.counts[place] < overlap)
        self.counts[place] = count


class Workload:
    """I items, of which each wants `overlap` judgements by different raters."""

    def __init__(self, db: sqlite3.Connection, overlap: int) -> None:
        """From a store, as it is in the transaction that is open."""
        self.db, self.overlap = db, min(overlap, MOST_COUNTED)
        self.numbers = array("q", (number for (number,) in db.execute("SELECT number FROM items ORDER BY number")))
        self.counts = bytearray(len(self.numbers))  # [I], judgements that stand
        self.views: OrderedDict[str, View] = OrderedDict()
        standing = db.execute(
            "SELECT item, CAST(seconds AS REAL) FROM judgements WHERE withdrawn_at IS NULL"
        ).fetchall()
        for item, _ in standing:
            self._add(item, 1)
        self.seconds = sorted(seconds for _, seconds in standing)

    def next_item(self, rater: str, held: Mapping[int, int]) -> int | None:
        """The item that this rater gets: first those for which nobody need be waited, of these the one with the fewest
        judgements, made or under way (`held`: of each item that lies before a rater, how many). None = nothing left."""
        view = self._view(rater)
        places = {self._place(item): count for item, count in held.items()}
        found = [
            (count + held_by >= self.overlap, count + held_by, place)
            for place, held_by in places.items()
            if (count := view.counts[place]) < self.overlap
        ]
        for count in range(self.overlap):
            place = view.counts.find(count)
            while place in places:
                place = view.counts.find(count, place + 1)
            if place >= 0:
                found.append((False, count, place))
                break
        return self.numbers[min(found)[-1]] if found else None

    def progress(self, rater: str, before: int | None) -> Progress:
        """`before`: the item that lies before this rater, which may have been judged often enough by others."""
        view = self._view(rater)
        extra = before is not None and self.overlap <= view.counts[self._place(before)] < DONE
        left, times = view.left + extra, view.seconds or self.seconds
        return Progress(len(view.seconds), left, left * _median(times) if times else None)

    def add_judgement(self, rater: str, item: int, seconds: float) -> None:
        """A judgement was made, and is in the store."""
        place, view = self._add(item, 1), self.views.get(rater)
        insort(self.seconds, seconds)
        if view is not None:
            view.set(place, DONE, self.overlap)
            insort(view.seconds, seconds)

    def withdraw_judgement(self, rater: str, item: int, seconds: float) -> None:
        """A judgement was taken back, and is marked so in the store."""
        place, view = self._add(item, -1), self.views.get(rater)
        self.seconds.pop(bisect_left(self.seconds, seconds))
        if view is not None:
            view.set(place, self.counts[place], self.overlap)
            view.seconds.pop(bisect_left(view.seconds, seconds))

    def _add(self, item: int, change: int) -> int:
        place = self._place(item)
        self.counts[place] = min(self.counts[place] + change, MOST_COUNTED)
        for view in self.views.values():
            if view.counts[place] != DONE:
                view.set(place, self.counts[place], self.overlap)
        return place

    def _place(self, item: int) -> int:
        return bisect_left(self.numbers, item)

    def _view(self, rater: str) -> View:
        view = self.views.pop(rater, None)
        if view is None:
            own = "SELECT item, CAST(seconds AS REAL) FROM judgements WHERE rater = ? AND withdrawn_at IS NULL"
            rows = self.db.execute(own, (rater,)).fetchall()
            view = View(self.counts, [self._place(item) for item, _ in rows], [each for _, each in rows], self.overlap)
        self.views[rater] = view
        if len(self.views) > KEPT:
            self.views.popitem(last=False)
        return view


def _median(rising: Sequence[float]) -> float:
    middle = len(rising) // 2
    return rising[middle] if len(rising) % 2 else (rising[middle - 1] + rising[middle]) / 2
