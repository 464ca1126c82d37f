"""The two records of a ranking study: an item to be ranked, and the judgement of one rater on it."""

from dataclasses import dataclass

from keel.data.rows import Content


@dataclass(frozen=True)
class Item:
    """A prompt and the responses that raters rank."""

    number: int  # primary key in the store, from 1
    prompt: Content
    responses: tuple[str, ...]
    source: str = ""  # origin of the responses, if known


@dataclass(frozen=True)
class Judgement:
    """The ranking of one item by one rater, or their statement that they cannot judge it."""

    item: Item
    rater: str
    # One rank per entry of item.responses: 1 is best, equal ranks tie, None = not ranked. None = cannot judge.
    ranks: tuple[int | None, ...] | None
    shown: tuple[int, ...]  # indices into item.responses in the order on the rater's page, top first
    seconds: float  # time for which the page was visible
    comment: str = ""
    tags: tuple[str, ...] = ()
    made: str = ""  # time of submission, ISO 8601 in UTC
