"""A deal: an item that is assigned to one rater, with its responses in an order of this rater's own."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from keel.errors import DataError
from keel.ranking.judgements import Item, Judgement


class NotDealt(LookupError):
    """The rater has no deal of this id."""


class Conflict(RuntimeError):
    """The request contradicts what the store has recorded since the page was loaded."""


@dataclass(frozen=True)
class Deal:
    """An item as one rater sees it."""

    id: str
    item: Item
    shown: tuple[int, ...]  # indices into item.responses, top first
    previous: Judgement | None  # this rater's withdrawn judgement of the item, to fill the page in again


@dataclass(frozen=True)
class Progress:
    """How far one rater is."""

    done: int
    left: int  # items that this rater may still get
    seconds_left: float | None  # left * the median time of this rater, or of all raters; None without any time yet


def response_order(num_responses: int, seed: int, item: int, rater: str) -> list[int]:
    """Return a shuffled order of the responses that depends on the seed, the item and the rater alone."""
    order = list(range(num_responses))
    random.Random(f"{seed} {item} {rater}").shuffle(order)
    return order


def ranks_from_marks(marks: Sequence[int | None] | None, shown: Sequence[int]) -> list[int | None] | None:
    """Convert a rater's marks to dense ranks 1..m of the item's responses.

    Args:
        marks: One per response in the order shown; lower is better, equal marks tie, None = not ranked.
            None in place of the list, or a list of None alone, = cannot judge.
        shown: Indices into the item's responses in the order shown.

    Raises:
        DataError: There is a wrong number of marks, a mark is not a whole number from 1, or fewer than two are set.
    """
    if marks is None or (len(marks) == len(shown) and all(mark is None for mark in marks)):
        return None
    if len(marks) != len(shown):
        raise DataError(f"{len(marks)} ranks for {len(shown)} responses")
    present = [mark for mark in marks if mark is not None]
    # type() and not isinstance(): JSON's true and false are ints in Python.
    if not all(type(mark) is int and mark >= 1 for mark in present):
        raise DataError("a rank must be a whole number from 1, or null")
    if len(present) < 2:
        raise DataError('rank at least two responses, or choose "Cannot judge"')
    levels = sorted(set(present))
    ranks: list[int | None] = [None] * len(shown)
    for mark, response in zip(marks, shown, strict=True):
        ranks[response] = None if mark is None else levels.index(mark) + 1
    return ranks
