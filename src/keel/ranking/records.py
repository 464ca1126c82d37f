"""Conversion of rows of the store to records. A value that keel cannot have written is refused, with its row named."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keel.data.items import FEWEST, MOST
from keel.errors import DataError
from keel.ranking.judgements import Item, Judgement


def item_from_row(row: sqlite3.Row, store: Path) -> Item:
    """Convert a row of table `items`. Raises DataError."""
    with _refuses_bad_values(store, "items", row["number"]):
        prompt, responses = json.loads(row["prompt"]), _parse_list(row["responses"])
        _require(isinstance(prompt, str) or _is_chat(prompt), "prompt")
        _require(FEWEST <= len(responses) <= MOST and all(isinstance(each, str) for each in responses), "responses")
        _require(isinstance(row["source"], str), "source")
        return Item(number=row["number"], prompt=prompt, responses=tuple(responses), source=row["source"])


def judgement_from_row(row: sqlite3.Row, item: Item, store: Path) -> Judgement:
    """Convert a row of `select_judgements`, which joins table `judgements` with `shown` of table `deals`.

    Raises DataError.
    """
    with _refuses_bad_values(store, "judgements", row["number"]):
        tags, seconds = _parse_list(row["tags"]), row["seconds"]
        ranks = None if row["ranks"] is None else _parse_list(row["ranks"])
        if ranks is not None:
            ranked = [rank for rank in ranks if rank is not None]
            _require(len(ranks) == len(item.responses) and len(ranked) >= 2, "ranks")
            _require(all(type(rank) is int and 1 <= rank <= len(ranks) for rank in ranked), "ranks")
        _require(all(isinstance(tag, str) for tag in tags), "tags")
        _require(isinstance(row["comment"], str) and isinstance(row["made_at"], str), "comment")
        _require(isinstance(seconds, float) and 0 <= seconds < float("inf"), "seconds")
        return Judgement(
            item=item,
            rater=row["rater"],
            ranks=None if ranks is None else tuple(ranks),
            shown=_parse_order(row["shown"], item),
            seconds=seconds,
            comment=row["comment"],
            tags=tuple(tags),
            made=row["made_at"],
        )


def order_from_row(row: sqlite3.Row, item: Item, store: Path) -> tuple[int, ...]:
    """Return `shown` of a row of table `deals`: indices into item.responses, top first. Raises DataError."""
    with _refuses_bad_values(store, "deals", row["id"]):
        return _parse_order(row["shown"], item)


def select_judgements(db: sqlite3.Connection, where: str, *values: Any) -> list[sqlite3.Row]:
    """Select rows of table `judgements`, each with the column `shown` of its deal."""
    return db.execute(
        f"SELECT judgements.*, (SELECT shown FROM deals WHERE id = deal) AS shown FROM judgements WHERE {where}", values
    ).fetchall()


def is_person(column: str) -> str:
    """Return the SQL condition that the rater in a column is a person, and not a judge."""
    judges = "coalesce((SELECT value FROM study WHERE name = 'judges'), '{}')"
    return f"{column} NOT IN (SELECT key FROM json_each({judges}))"


def encode_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parse_order(text: Any, item: Item) -> tuple[int, ...]:
    shown = _parse_list(text)
    _require(all(type(index) is int for index in shown) and sorted(shown) == [*range(len(item.responses))], "shown")
    return tuple(shown)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value)


def _parse_list(text: Any) -> list[Any]:
    value = json.loads(text)
    _require(isinstance(value, list), "a list")
    return list(value)


def _require(is_valid: bool, column: str) -> None:
    if not is_valid:
        raise ValueError(column)


@contextmanager
def _refuses_bad_values(store: Path, table: str, key: Any) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RecursionError) as error:
        what = f"row {key!r:.40} of table {table} is not as keel writes it: {error!s:.80}"
        raise DataError(what, str(store), "restore the file from a copy, or choose another store") from error
