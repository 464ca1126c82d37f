"""What raters said of answers: the items they were shown, and one judgement for each item and rater."""

from dataclasses import dataclass

from keel.data.rows import Content


@dataclass(frozen=True)
class Item:
    """Answers to one prompt, to be ranked."""

    number: int  # in its store, from 1
    prompt: Content
    responses: tuple[str, ...]
    source: str = ""  # where the answers come from, where that is known


@dataclass(frozen=True)
class Judgement:
    """One rater's word on one item."""

    item: Item
    rater: str
    ranks: tuple[int | None, ...] | None  # of item.responses: 1 is best, equal tie, None = not ranked; or cannot judge
    shown: tuple[int, ...]  # indices of item.responses in the order in which the rater saw them, first on top
    seconds: float  # that the item was looked at
    comment: str = ""
    tags: tuple[str, ...] = ()
    made: str = ""  # when, ISO 8601 in UTC
