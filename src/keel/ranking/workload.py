"""The work that is left in a study, kept in memory: the next item of each rater, and the progress of each.

To choose an item costs a few passes of `bytearray.find` over one byte per item, however many items are ranked.
"""

import sqlite3
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from keel.ranking.deals import Progress
from keel.ranking.records import is_person

DONE = 255  # in place of a count: this rater has judged the item
MAX_COUNT = 254
MAX_VIEWS = 200  # raters whose view is kept in memory


class RaterView:
    """The items from the point of view of one rater."""

    def __init__(self, counts: bytearray, done: Sequence[int], seconds: Sequence[float], overlap: int) -> None:
        self.counts = bytearray(counts)  # [I], valid judgements of each item, or DONE
        for index in done:
            self.counts[index] = DONE
        # Items below the overlap that this rater has not judged. DONE is never in range(overlap).
        self.left = sum(map(self.counts.count, range(overlap)))
        self.seconds = sorted(seconds)  # one per judgement of this rater

    def set_count(self, index: int, count: int, overlap: int) -> None:
        self.left += (count < overlap) - (self.counts[index] < overlap)
        self.counts[index] = count


class Workload:
    """Counts of judgements for I items, each of which needs `overlap` judgements by different raters."""

    def __init__(self, db: sqlite3.Connection, overlap: int) -> None:
        """Read the counts from a store, inside the open transaction."""
        self.db, self.overlap = db, min(overlap, MAX_COUNT)
        self.numbers = array("q", (row["number"] for row in db.execute("SELECT number FROM items ORDER BY number")))
        self.counts = bytearray(len(self.numbers))  # [I], valid judgements of each item
        self.views: OrderedDict[str, RaterView] = OrderedDict()
        rows = db.execute(
            "SELECT item, CAST(seconds AS REAL) AS seconds FROM judgements"
            f" WHERE withdrawn_at IS NULL AND {is_person('rater')}"  # a judge takes no item from the people
        ).fetchall()
        for row in rows:
            self._change_count(row["item"], 1)
        self.seconds = sorted(row["seconds"] for row in rows)

    def next_item(self, rater: str, held: Mapping[int, int]) -> int | None:
        """Return the number of the item to deal to this rater, or None if nothing is left.

        Items that need another rater even if all open deals are completed come first. Among these, the item with the
        fewest judgements and open deals is chosen.

        Args:
            rater: Name of the rater.
            held: Item number -> number of raters with an open deal of it.
        """
        view = self._view(rater)
        held_at = {self._index(item): raters for item, raters in held.items()}
        candidates = [
            (count + raters >= self.overlap, count + raters, index)
            for index, raters in held_at.items()
            if (count := view.counts[index]) < self.overlap
        ]
        for count in range(self.overlap):
            index = view.counts.find(count)
            while index in held_at:
                index = view.counts.find(count, index + 1)
            if index >= 0:
                candidates.append((False, count, index))
                break
        return self.numbers[min(candidates)[-1]] if candidates else None

    def progress(self, rater: str, open_item: int | None) -> Progress:
        """Return how far a rater is.

        Args:
            rater: Name of the rater.
            open_item: Item of the rater's open deal. It counts as left although others may have completed it.
        """
        view = self._view(rater)
        extra = open_item is not None and self.overlap <= view.counts[self._index(open_item)] < DONE
        left, times = view.left + extra, view.seconds or self.seconds
        return Progress(done=len(view.seconds), left=left, seconds_left=left * _median(times) if times else None)

    def add_judgement(self, rater: str, item: int, seconds: float) -> None:
        """Count a judgement that was written to the store."""
        index, view = self._change_count(item, 1), self.views.get(rater)
        insort(self.seconds, seconds)
        if view is not None:
            view.set_count(index, DONE, self.overlap)
            insort(view.seconds, seconds)

    def withdraw_judgement(self, rater: str, item: int, seconds: float) -> None:
        """Stop counting a judgement that was marked as withdrawn in the store."""
        index, view = self._change_count(item, -1), self.views.get(rater)
        self.seconds.pop(bisect_left(self.seconds, seconds))
        if view is not None:
            view.set_count(index, self.counts[index], self.overlap)
            view.seconds.pop(bisect_left(view.seconds, seconds))

    def _change_count(self, item: int, change: int) -> int:
        index = self._index(item)
        self.counts[index] = min(self.counts[index] + change, MAX_COUNT)
        for view in self.views.values():
            if view.counts[index] != DONE:
                view.set_count(index, self.counts[index], self.overlap)
        return index

    def _index(self, item: int) -> int:
        return bisect_left(self.numbers, item)

    def _view(self, rater: str) -> RaterView:
        view = self.views.pop(rater, None)
        if view is None:
            rows = self.db.execute(
                "SELECT item, CAST(seconds AS REAL) AS seconds FROM judgements"
                " WHERE rater = ? AND withdrawn_at IS NULL",
                (rater,),
            ).fetchall()
            done = [self._index(row["item"]) for row in rows]
            view = RaterView(self.counts, done, [row["seconds"] for row in rows], self.overlap)
        self.views[rater] = view
        if len(self.views) > MAX_VIEWS:
            self.views.popitem(last=False)
        return view


def _median(ascending: Sequence[float]) -> float:
    middle = len(ascending) // 2
    return ascending[middle] if len(ascending) % 2 else (ascending[middle - 1] + ascending[middle]) / 2
