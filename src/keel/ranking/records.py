"""Rows of a store as what they mean. A value that keel cannot have written is refused, and its row named."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keel.data.items import FEWEST, MOST
from keel.errors import DataError
from keel.ranking.judgements import Item, Judgement


def as_item(row: sqlite3.Row, store: Path) -> Item:
    """A row of table `items`. Raises DataError."""
    with _fitting(store, "items", row["number"]):
        prompt, responses = json.loads(row["prompt"]), _list(row["responses"])
        _require(isinstance(prompt, str) or _is_chat(prompt), "prompt")
        _require(FEWEST <= len(responses) <= MOST and all(isinstance(each, str) for each in responses), "responses")
        _require(isinstance(row["source"], str), "source")
        return Item(row["number"], prompt, tuple(responses), row["source"])


def as_judgement(row: sqlite3.Row, item: Item, store: Path) -> Judgement:
    """A row of table `judgements`, with `shown` of its deal. Raises DataError."""
    with _fitting(store, "judgements", row["number"]):
        tags, seconds = _list(row["tags"]), row["seconds"]
        ranks = None if row["ranks"] is None else _list(row["ranks"])
        if ranks is not None:
            given = [rank for rank in ranks if rank is not None]
            _require(len(ranks) == len(item.responses) and len(given) >= 2, "ranks")
            _require(all(type(rank) is int and 1 <= rank <= len(ranks) for rank in given), "ranks")
        _require(all(isinstance(tag, str) for tag in tags), "tags")
        _require(isinstance(row["comment"], str) and isinstance(row["made_at"], str), "comment")
        _require(isinstance(seconds, float) and 0 <= seconds < float("inf"), "seconds")
        said = (None if ranks is None else tuple(ranks), _order(row["shown"], item), seconds)
        return Judgement(item, row["rater"], *said, row["comment"], tuple(tags), row["made_at"])


def as_order(row: sqlite3.Row, item: Item, store: Path) -> tuple[int, ...]:
    """Indices of the responses of a row of table `deals`, as shown. Raises DataError."""
    with _fitting(store, "deals", row["id"]):
        return _order(row["shown"], item)


def select_judgements(db: sqlite3.Connection, which: str, *values: Any) -> list[sqlite3.Row]:
    """Judgements, with the order in which the answers were shown."""
    return db.execute(
        f"SELECT judgements.*, (SELECT shown FROM deals WHERE id = deal) AS shown FROM judgements WHERE {which}", values
    ).fetchall()


def encode_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _order(text: Any, item: Item) -> tuple[int, ...]:
    shown = _list(text)
    _require(all(type(place) is int for place in shown) and sorted(shown) == [*range(len(item.responses))], "shown")
    return tuple(shown)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value)


def _list(text: Any) -> list[Any]:
    value = json.loads(text)
    _require(isinstance(value, list), "a list")
    return list(value)


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


@contextmanager
def _fitting(store: Path, table: str, row: Any) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RecursionError) as error:
        what = f"row {row!r:.40} of table {table} is not as keel writes it: {error!s:.80}"
        raise DataError(what, str(store), "put a copy of it back, or choose another store") from error
