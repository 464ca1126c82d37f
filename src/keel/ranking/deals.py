"""What lies before a rater: an item with its answers in an order of the rater's own, and what comes of it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from keel.errors import DataError
from keel.ranking.judgements import Item, Judgement


class NotDealt(LookupError):
    """No such deal was made to this rater."""


class Conflict(RuntimeError):
    """What was asked does not fit what has happened since."""


@dataclass(frozen=True)
class Deal:
    """An item as one rater sees it."""

    id: str
    item: Item
    shown: tuple[int, ...]  # indices of item.responses, first on top
    previous: Judgement | None  # what this rater said of it and took back


@dataclass(frozen=True)
class Progress:
    """How far one rater is."""

    done: int
    left: int  # items that may still come
    seconds_left: float | None  # for them, at the median of this rater's times, else of everybody's; None = no time yet


def response_order(num_responses: int, seed: int, item: int, rater: str) -> list[int]:
    """The order in which a rater sees the answers of an item: always the same, and another for each."""
    order = list(range(num_responses))
    random.Random(f"{seed} {item} {rater}").shuffle(order)
    return order


def as_ranks(marks: Sequence[int | None] | None, shown: Sequence[int]) -> list[int | None] | None:
    """Ranks 1..m of the responses from a rater's marks (lower is better) in the order shown; None = cannot judge.

    Raises DataError for marks that rank nothing.
    """
    if marks is None or (len(marks) == len(shown) and all(mark is None for mark in marks)):
        return None
    if len(marks) != len(shown):
        raise DataError(f"{len(marks)} ranks for {len(shown)} answers")
    given = [mark for mark in marks if mark is not None]
    if not all(type(mark) is int and mark >= 1 for mark in given):
        raise DataError("a rank is a whole number from 1, or null")
    if len(given) < 2:
        raise DataError("rank at least two answers, or say that you cannot judge")
    levels = sorted(set(given))
    ranks: list[int | None] = [None] * len(shown)
    for mark, response in zip(marks, shown, strict=True):
        ranks[response] = None if mark is None else levels.index(mark) + 1
    return ranks
