"""Where rankings are kept: the items, the raters, who saw what in which order, and what they said."""

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
from keel.ranking.deals import Conflict, Deal, NotDealt, Progress, as_ranks, response_order
from keel.ranking.judgements import Item, Judgement
from keel.ranking.records import as_item, as_judgement, as_order, encode_json, select_judgements
from keel.ranking.workload import Workload

HELD_SECONDS = 600.0  # after which an item that a rater has not ranked may go to another
LONGEST_NAME = 64

HELD = "SELECT item, COUNT(*) FROM deals WHERE open = 1 AND dealt_at > ? GROUP BY item"


class Store:
    """A store on a disk. Its methods may be called from any thread; each is one transaction.

    Each raises StoreError when the disk or another program is in the way, and then nothing counts as done.
    """

    def __init__(self, database: Database, overlap: int, seed: int) -> None:
        self.database, self.overlap, self.seed = database, overlap, seed
        self.workload: tuple[int, Workload] | None = None  # with the version of the file that it was read from

    @classmethod
    def reading(cls, path: str) -> "Store":
        """A store that another `Store` has open, to read it alone. Raises StoreError when it cannot be read now."""
        database = Database.reading(Path(path))
        return cls(database, _remembered(database, "overlap", None, 1), 0)

    @classmethod
    def open(cls, path: str, overlap: int | None = None, seed: int = 0) -> "Store":
        """Each item goes to `overlap` raters, which is remembered (None: as many as before, at first one); `seed` is of
        the order in which they see the answers.

        Raises DataError for a file that is no store, StoreError when it cannot be read now.
        """
        database = Database.open(Path(path))
        try:
            return cls(database, _remembered(database, "overlap", overlap, 1), seed)
        except BaseException:
            database.close()
            raise

    def remember(self, name: str, given: Any, default: Any = None) -> Any:
        """A fact about the study, as JSON has it: what is given, else what was given before, else the default."""
        return _remembered(self.database, name, given, default)

    def close(self) -> None:
        self.database.close()

    def rest(self, seconds: float) -> None:
        """Leave everything in the one file if nothing was written for so long: then a copy of it is complete."""
        self.database.rest(seconds)

    def backup(self, path: str) -> None:
        """Write a complete copy of this moment to a new file. Raises StoreError, OSError where it cannot be written."""
        self.database.backup(Path(path))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block as one transaction; nothing is committed until it ends."""
        try:
            with self.database.transaction("IMMEDIATE"):
                yield
        except BaseException:
            self.workload = None
            raise

    def add_items(self, rows: Iterable[UnrankedResponses]) -> int:
        """How many of the rows are new; the others are there already."""
        with self.database.transaction("IMMEDIATE") as db:
            before, self.workload = db.total_changes, None
            db.executemany(
                "INSERT INTO items (key, prompt, responses, source) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                ((row.key, encode_json(row.prompt), encode_json(row.responses), row.source) for row in rows),
            )
            return db.total_changes - before

    def add_raters(self, names: Iterable[str]) -> None:
        """A new name gets a token, a known one keeps its own. Raises DataError for what is no name."""
        names = list(names)
        for name in names:
            if name == "owner":
                raise DataError("owner is the name of the one who reads the figures", "raters", "choose another")
            if not (0 < len(name) <= LONGEST_NAME and name.isprintable() and name.strip() == name):
                raise DataError(f"{name[:80]!r} is no name of 1 to {LONGEST_NAME} printable characters", "raters")
        with self.database.transaction("IMMEDIATE") as db:
            db.executemany(
                "INSERT INTO raters (name, token) VALUES (?, ?) ON CONFLICT (name) DO NOTHING",
                ((name, secrets.token_urlsafe(24)) for name in names),
            )

    def owner_token(self) -> str:
        """192 random bits, drawn once."""
        with self.database.transaction("IMMEDIATE") as db:
            db.execute("INSERT INTO owner VALUES (1, ?) ON CONFLICT (only) DO NOTHING", (secrets.token_urlsafe(24),))
            return str(db.execute("SELECT token FROM owner").fetchone()["token"])

    def tokens(self) -> dict[str, str]:
        """The token of each rater, in the order in which they came."""
        with self.database.transaction("DEFERRED") as db:
            return {row["name"]: row["token"] for row in db.execute("SELECT * FROM raters ORDER BY rowid")}

    def raters(self) -> list[str]:
        return list(self.tokens())

    def items(self) -> list[Item]:
        """Raises DataError for a row that keel cannot have written; so does all that returns rows."""
        with self.database.transaction("DEFERRED") as db:
            rows = db.execute("SELECT * FROM items ORDER BY number").fetchall()
        return [as_item(row, self.database.path) for row in rows]

    def num_items(self) -> int:
        with self.database.transaction("DEFERRED") as db:
            return int(db.execute("SELECT COUNT(*) FROM items").fetchone()[0])

    def judgements(self) -> list[Judgement]:
        """Those that stand, in the order in which they were made."""
        with self.database.transaction("DEFERRED") as db:
            items = db.execute("SELECT * FROM items").fetchall()
            found = select_judgements(db, "withdrawn_at IS NULL ORDER BY number")
        path = self.database.path  # from here on nobody waits for us
        known = {row["number"]: as_item(row, path) for row in items}
        return [as_judgement(row, known[row["item"]], path) for row in found]

    def num_judgements(self) -> int:
        """How many stand."""
        with self.database.transaction("DEFERRED") as db:
            (number,) = db.execute("SELECT COUNT(*) FROM judgements WHERE withdrawn_at IS NULL").fetchone()
            return int(number)

    def deal(self, rater: str) -> Deal | None:
        """What lies before this rater until it is judged: the same item at each call, then a new one; None = done."""
        with self.database.transaction("IMMEDIATE") as db:
            found = db.execute("SELECT * FROM deals WHERE rater = ? AND open = 1", (rater,)).fetchone()
            if found is None:
                held = dict(db.execute(HELD, (time() - HELD_SECONDS,)).fetchall())
                chosen = self._workload(db).next_item(rater, held)
                if chosen is None:
                    return None
                item = self._item_of(db, chosen)
                order = response_order(len(item.responses), self.seed, item.number, rater)
                found = _begin(db, rater, item.number, encode_json(order))
            return self._deal(db, found)

    def record_judgement(
        self,
        rater: str,
        deal: str,
        ranks: Sequence[int | None] | None,
        comment: str = "",
        tags: Sequence[str] = (),
        seconds: float = 0.0,
    ) -> None:
        """Keep what was said of a deal: `ranks` in the order shown, None = cannot judge. Said again, it counts once.

        `seconds` are at most those since the deal by the clock of this machine. Raises DataError for ranks that are
        none, NotDealt, and Conflict when the deal was judged otherwise or is over.
        """
        with self.database.transaction("IMMEDIATE") as db:
            found = db.execute("SELECT * FROM deals WHERE id = ? AND rater = ?", (deal, rater)).fetchone()
            if found is None:
                raise NotDealt("No such item was dealt to you.")
            response = as_ranks(ranks, json.loads(found["shown"]))
            said = (
                None if response is None else encode_json(response),
                comment,
                encode_json(list(dict.fromkeys(tags))),
            )
            before = db.execute("SELECT * FROM judgements WHERE deal = ?", (deal,)).fetchone()
            if before is not None and before["withdrawn_at"] is None and (*before[4:7],) == said:
                return
            if not found["open"]:
                raise Conflict("This item is ranked already, or was put aside: load the page again.")
            workload = self._workload(db)  # as it is before
            looked = max(0.0, min(seconds, time() - found["dealt_at"]))
            db.execute("UPDATE deals SET open = 0 WHERE id = ?", (deal,))
            db.execute(
                "INSERT INTO judgements (deal, item, rater, ranks, comment, tags, seconds, made_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (deal, found["item"], rater, *said, looked, _now()),
            )
            workload.add_judgement(rater, found["item"], looked)

    def undo(self, rater: str) -> Deal:
        """Withdraw this rater's last word and deal its item again. Raises Conflict when there is none."""
        with self.database.transaction("IMMEDIATE") as db:
            last = select_judgements(db, "rater = ? AND withdrawn_at IS NULL ORDER BY number DESC LIMIT 1", rater)
            if not last:
                raise Conflict("There is nothing to undo.")
            workload = self._workload(db)  # as it is before
            db.execute("UPDATE judgements SET withdrawn_at = ? WHERE number = ?", (_now(), last[0]["number"]))
            db.execute("UPDATE deals SET open = 0 WHERE rater = ? AND open = 1", (rater,))
            workload.withdraw_judgement(rater, last[0]["item"], last[0]["seconds"])
            return self._deal(db, _begin(db, rater, last[0]["item"], last[0]["shown"]))

    def progress(self, rater: str) -> Progress:
        with self.database.transaction("DEFERRED") as db:
            found = db.execute("SELECT item FROM deals WHERE rater = ? AND open = 1", (rater,)).fetchone()
            return self._workload(db).progress(rater, found and found["item"])

    def _workload(self, db: sqlite3.Connection) -> Workload:
        """As it is in the transaction that is open: read again when another program has written to the file."""
        (version,) = db.execute("PRAGMA data_version").fetchone()
        if self.workload is None or self.workload[0] != version or self.workload[1].overlap != self.overlap:
            self.workload = (version, Workload(db, self.overlap))
        return self.workload[1]

    def _deal(self, db: sqlite3.Connection, row: sqlite3.Row) -> Deal:
        item, path = self._item_of(db, row["item"]), self.database.path
        taken_back = select_judgements(
            db, "item = ? AND rater = ? ORDER BY number DESC LIMIT 1", row["item"], row["rater"]
        )
        previous = as_judgement(taken_back[0], item, path) if taken_back else None
        return Deal(row["id"], item, as_order(row, item, path), previous)

    def _item_of(self, db: sqlite3.Connection, number: int) -> Item:
        return as_item(db.execute("SELECT * FROM items WHERE number = ?", (number,)).fetchone(), self.database.path)


def _remembered(database: Database, name: str, given: Any, default: Any) -> Any:
    """What counts from now on: what is given, else what was given before, else the default."""
    if given is not None:
        with database.transaction("IMMEDIATE") as db:
            db.execute("INSERT OR REPLACE INTO study VALUES (?, ?)", (name, encode_json(given)))
    with database.transaction("DEFERRED") as db:
        known = db.execute("SELECT value FROM study WHERE name = ?", (name,)).fetchone()
        return json.loads(known["value"]) if known else default


def _begin(db: sqlite3.Connection, rater: str, item: int, shown: str) -> sqlite3.Row:
    new = (secrets.token_urlsafe(18), item, rater, shown, time())
    db.execute("INSERT INTO deals (id, item, rater, shown, dealt_at) VALUES (?, ?, ?, ?, ?)", new)
    row: sqlite3.Row = db.execute("SELECT * FROM deals WHERE id = ?", new[:1]).fetchone()
    return row


def _now() -> str:
    return datetime.fromtimestamp(time(), UTC).isoformat(timespec="seconds")
