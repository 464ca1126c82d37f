"""The store of a ranking study: items, raters, deals and judgements in one SQLite file."""

import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any

from keel.data.items import UnrankedResponses
from keel.errors import DataError
from keel.ranking.database import Database
from keel.ranking.deals import Conflict, Deal, NotDealt, Progress, ranks_from_marks, response_order
from keel.ranking.judgements import Item, Judgement
from keel.ranking.records import (
    encode_json,
    is_person,
    item_from_row,
    judgement_from_row,
    order_from_row,
    select_judgements,
)
from keel.ranking.workload import Workload

HELD_SECONDS = 600.0  # a dealt item that was not ranked for longer is also dealt to others
LONGEST_NAME = 64

SELECT_HELD = "SELECT item, COUNT(*) AS raters FROM deals WHERE open = 1 AND dealt_at > ? GROUP BY item"


class Store:
    """A ranking study on disk.

    Methods may be called from any thread. Each is one transaction, and raises StoreError if the disk or another
    program prevents it; then nothing has changed.
    """

    def __init__(self, database: Database, overlap: int, seed: int) -> None:
        self.database, self.overlap, self.seed = database, overlap, seed
        self.workload: tuple[tuple[int, int], Workload] | None = None  # after the version of the data that it counts

    @classmethod
    def reading(cls, path: str) -> "Store":
        """Open, for reading only, a store that another `Store` has open. Raises StoreError."""
        database = Database.reading(Path(path))
        return cls(database, _remember(database, "overlap", None, 1), 0)

    @classmethod
    def open(cls, path: str, overlap: int | None = None, seed: int = 0) -> "Store":
        """Open a store; create the file if there is none.

        Args:
            path: The SQLite file.
            overlap: Number of raters per item, which the store remembers. None = the remembered number, at first 1.
            seed: Random seed of the order in which raters see responses.

        Raises:
            DataError: The file is not a store.
            StoreError: The file cannot be read at present.
        """
        database = Database.open(Path(path))
        try:
            return cls(database, _remember(database, "overlap", overlap, 1), seed)
        except BaseException:
            database.close()
            raise

    def remember(self, name: str, value: Any, default: Any = None) -> Any:
        """Store a setting of the study as JSON, and return the one in force.

        That is the value, or if the value is None, the stored one, or if there is none, the default.
        """
        return _remember(self.database, name, value, default)

    def close(self) -> None:
        self.database.close()

    def rest(self, seconds: float) -> None:
        """Write the log into the file if nothing was written for this many seconds. A copy of it is then complete."""
        self.database.rest(seconds)

    def backup(self, path: str) -> None:
        """Write a self-contained snapshot to a new file. Raises StoreError, or OSError if it cannot be written."""
        self.database.backup(Path(path))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block as one transaction; nothing is committed until it ends."""
        with self.database.transaction("IMMEDIATE"):
            yield

    def add_items(self, rows: Iterable[UnrankedResponses]) -> int:
        """Add the rows that the store does not have yet. Return how many that were."""
        with self.database.transaction("IMMEDIATE") as db:
            previous_changes, self.workload = db.total_changes, None
            db.executemany(
                "INSERT INTO items (key, prompt, responses, source) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                ((row.key, encode_json(row.prompt), encode_json(row.responses), row.source) for row in rows),
            )
            return db.total_changes - previous_changes

    def add_raters(self, names: Iterable[str]) -> None:
        """Add raters, each with a new token. A rater who is in the store keeps the token.

        Raises DataError for a name that is reserved, empty, too long, not printable or that of a judge.
        """
        names, judges = list(names), self.judges()
        for name in names:
            if name in judges:
                raise DataError(f"the rater {name!r} of this study is a judge", "raters", "choose another name")
            if name == "owner":
                raise DataError(
                    "the name `owner` is reserved for the owner of the study", "raters", "choose another name"
                )
            if not (0 < len(name) <= LONGEST_NAME and name.isprintable() and name.strip() == name):
                raise DataError(
                    f"{name[:80]!r} is not a name of 1 to {LONGEST_NAME} printable characters",
                    "raters",
                    "choose another",
                )
        with self.database.transaction("IMMEDIATE") as db:
            db.executemany(
                "INSERT INTO raters (name, token) VALUES (?, ?) ON CONFLICT (name) DO NOTHING",
                ((name, secrets.token_urlsafe(24)) for name in names),
            )

    def owner_token(self) -> str:
        """Return the owner's token, 192 random bits that are drawn once."""
        with self.database.transaction("IMMEDIATE") as db:
            db.execute(
                "INSERT INTO owner (only, token) VALUES (1, ?) ON CONFLICT (only) DO NOTHING",
                (secrets.token_urlsafe(24),),
            )
            return str(db.execute("SELECT token FROM owner").fetchone()["token"])

    def tokens(self) -> dict[str, str]:
        """Return rater -> token for all people, in the order in which they were added."""
        with self.database.transaction("DEFERRED") as db:
            rows = db.execute(f"SELECT * FROM raters WHERE {is_person('name')} ORDER BY rowid").fetchall()
        return {row["name"]: row["token"] for row in rows}

    def raters(self) -> list[str]:
        """Return the names of all people."""
        return list(self.tokens())

    def judges(self) -> dict[str, Any]:
        """Return the judges by name, with their model and the hash of their rubric."""
        return dict(self.remember("judges", None, {}))

    def items(self) -> list[Item]:
        """Return all items.

        Like each method that returns records, raises DataError for a row that keel cannot have written.
        """
        with self.database.transaction("DEFERRED") as db:
            rows = db.execute("SELECT * FROM items ORDER BY number").fetchall()
        return [item_from_row(row, self.database.path) for row in rows]

    def num_items(self) -> int:
        with self.database.transaction("DEFERRED") as db:
            return int(db.execute("SELECT COUNT(*) AS items FROM items").fetchone()["items"])

    def judgements(self) -> list[Judgement]:
        """Return the judgements that were not withdrawn, in order of submission."""
        with self.database.transaction("DEFERRED") as db:
            item_rows = db.execute("SELECT * FROM items").fetchall()
            judgement_rows = select_judgements(db, "withdrawn_at IS NULL ORDER BY number")
        # Parse outside the transaction: meanwhile other threads can use the connection.
        path = self.database.path
        items = {row["number"]: item_from_row(row, path) for row in item_rows}
        return [judgement_from_row(row, items[row["item"]], path) for row in judgement_rows]

    def num_judgements(self) -> int:
        """Return the number of judgements that were not withdrawn."""
        with self.database.transaction("DEFERRED") as db:
            row = db.execute("SELECT COUNT(*) AS valid FROM judgements WHERE withdrawn_at IS NULL").fetchone()
            return int(row["valid"])

    def deal(self, rater: str) -> Deal | None:
        """Return the rater's open deal, or deal the next item. None = there is nothing left to rank.

        Until the rater submits a judgement, each call returns the same deal.
        """
        with self.database.transaction("IMMEDIATE") as db:
            row = db.execute("SELECT * FROM deals WHERE rater = ? AND open = 1", (rater,)).fetchone()
            if row is None:
                held_rows = db.execute(SELECT_HELD, (time() - HELD_SECONDS,)).fetchall()
                number = self._workload(db).next_item(rater, {held["item"]: held["raters"] for held in held_rows})
                if number is None:
                    return None
                item = self._select_item(db, number)
                order = response_order(len(item.responses), self.seed, item.number, rater)
                row = insert_deal(db, rater, item.number, encode_json(order))
            return self._deal_from_row(db, row)

    def record_judgement(
        self,
        rater: str,
        deal: str,
        ranks: Sequence[int | None] | None,
        comment: str = "",
        tags: Sequence[str] = (),
        seconds: float = 0.0,
    ) -> None:
        """Record the judgement of a deal. If the same judgement is submitted again, it counts once.

        Args:
            rater: Name of the rater.
            deal: Id of the deal.
            ranks: One per response in the order shown; None = cannot judge. See `ranks_from_marks`.
            comment: Free text.
            tags: Labels; duplicates are dropped.
            seconds: Time for which the page was visible. Limited to the time since the deal by this machine's clock.

        Raises:
            DataError: `ranks` are not valid.
            NotDealt: The rater has no deal of this id.
            Conflict: The deal has a different judgement, or is no longer open.
        """
        with self.database.transaction("IMMEDIATE") as db:
            dealt = db.execute("SELECT * FROM deals WHERE id = ? AND rater = ?", (deal, rater)).fetchone()
            if dealt is None:
                raise NotDealt("No such item was dealt to you.")
            response_ranks = ranks_from_marks(ranks, json.loads(dealt["shown"]))
            content = {
                "ranks": None if response_ranks is None else encode_json(response_ranks),
                "comment": comment,
                "tags": encode_json(list(dict.fromkeys(tags))),
            }
            recorded = db.execute("SELECT * FROM judgements WHERE deal = ?", (deal,)).fetchone()
            is_recorded = recorded is not None and recorded["withdrawn_at"] is None
            if is_recorded and all(recorded[column] == value for column, value in content.items()):
                return
            if not dealt["open"]:
                raise Conflict("This item is ranked already, or was withdrawn. Load the page again.")
            workload = self._workload(db)  # read before the insert, which it would otherwise count twice
            visible_seconds = max(0.0, min(seconds, time() - dealt["dealt_at"]))
            db.execute("UPDATE deals SET open = 0 WHERE id = ?", (deal,))
            db.execute(
                "INSERT INTO judgements (deal, item, rater, ranks, comment, tags, seconds, made_at)"
                " VALUES (:deal, :item, :rater, :ranks, :comment, :tags, :seconds, :made_at)",
                {
                    "deal": deal,
                    "item": dealt["item"],
                    "rater": rater,
                    **content,
                    "seconds": visible_seconds,
                    "made_at": utc_now(),
                },
            )
            workload.add_judgement(rater, dealt["item"], visible_seconds)

    def undo(self, rater: str) -> Deal:
        """Withdraw this rater's last judgement and deal its item again. Raises Conflict if there is none."""
        with self.database.transaction("IMMEDIATE") as db:
            rows = select_judgements(db, "rater = ? AND withdrawn_at IS NULL ORDER BY number DESC LIMIT 1", rater)
            if not rows:
                raise Conflict("There is nothing to undo.")
            (last,) = rows
            workload = self._workload(db)  # read before the update, which it would otherwise count twice
            db.execute("UPDATE judgements SET withdrawn_at = ? WHERE number = ?", (utc_now(), last["number"]))
            db.execute("UPDATE deals SET open = 0 WHERE rater = ? AND open = 1", (rater,))
            workload.withdraw_judgement(rater, last["item"], last["seconds"])
            return self._deal_from_row(db, insert_deal(db, rater, last["item"], last["shown"]))

    def progress(self, rater: str) -> Progress:
        with self.database.transaction("DEFERRED") as db:
            row = db.execute("SELECT item FROM deals WHERE rater = ? AND open = 1", (rater,)).fetchone()
            return self._workload(db).progress(rater, None if row is None else row["item"])

    def _workload(self, db: sqlite3.Connection) -> Workload:
        """Return the workload as of the open transaction.

        It is read again if another program has written to the file, or if changes that it counts were rolled back.
        """
        version = (db.execute("PRAGMA data_version").fetchone()["data_version"], self.database.num_rollbacks)
        if self.workload is None or self.workload[0] != version or self.workload[1].overlap != self.overlap:
            self.workload = (version, Workload(db, self.overlap))
        return self.workload[1]

    def _deal_from_row(self, db: sqlite3.Connection, row: sqlite3.Row) -> Deal:
        item, path = self._select_item(db, row["item"]), self.database.path
        withdrawn = select_judgements(
            db, "item = ? AND rater = ? ORDER BY number DESC LIMIT 1", row["item"], row["rater"]
        )
        return Deal(
            id=row["id"],
            item=item,
            shown=order_from_row(row, item, path),
            previous=judgement_from_row(withdrawn[0], item, path) if withdrawn else None,
        )

    def _select_item(self, db: sqlite3.Connection, number: int) -> Item:
        row = db.execute("SELECT * FROM items WHERE number = ?", (number,)).fetchone()
        return item_from_row(row, self.database.path)


def _remember(database: Database, name: str, value: Any, default: Any) -> Any:
    if value is not None:
        with database.transaction("IMMEDIATE") as db:
            db.execute("INSERT OR REPLACE INTO study (name, value) VALUES (?, ?)", (name, encode_json(value)))
    with database.transaction("DEFERRED") as db:
        row = db.execute("SELECT value FROM study WHERE name = ?", (name,)).fetchone()
        return json.loads(row["value"]) if row else default


def insert_deal(db: sqlite3.Connection, rater: str, item: int, shown: str, is_open: bool = True) -> sqlite3.Row:
    """Insert a row of table `deals`, and return it."""
    deal = secrets.token_urlsafe(18)
    db.execute(
        "INSERT INTO deals (id, item, rater, shown, dealt_at, open) VALUES (?, ?, ?, ?, ?, ?)",
        (deal, item, rater, shown, time(), int(is_open)),
    )
    row: sqlite3.Row = db.execute("SELECT * FROM deals WHERE id = ?", (deal,)).fetchone()
    return row


def utc_now() -> str:
    """Return the time in ISO 8601."""
    return datetime.fromtimestamp(time(), UTC).isoformat(timespec="seconds")
