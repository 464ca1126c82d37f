"""Where rankings are kept: the items, the raters, who saw what in which order, and what they said."""

import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import time
from typing import Any

from keel.data.answers import Answers
from keel.data.database import Database
from keel.data.deals import Conflict, Deal, NotDealt, Progress, as_ranks, shuffled
from keel.data.judgements import Item, Judgement
from keel.errors import DataError

HELD_SECONDS = 600.0  # after which an item that a rater has not ranked may go to another
LONGEST_NAME = 64

STANDING = "(SELECT COUNT(*) FROM judgements WHERE item = items.number AND withdrawn_at IS NULL)"
NOT_JUDGED = "number NOT IN (SELECT item FROM judgements WHERE rater = :rater AND withdrawn_at IS NULL)"
# First the items for which nobody need be waited; of these the one with the fewest judgements, made or under way.
NEXT_ITEM = f"""
SELECT number FROM (
    SELECT number, {STANDING} AS judged,
        (SELECT COUNT(*) FROM deals WHERE item = items.number AND open = 1 AND dealt_at > :since) AS held
    FROM items WHERE {NOT_JUDGED}
) WHERE judged < :overlap ORDER BY judged + held >= :overlap, judged + held, number LIMIT 1
"""
NUM_LEFT = f"""
SELECT COUNT(*) FROM items WHERE {NOT_JUDGED} AND
    ({STANDING} < :overlap OR number IN (SELECT item FROM deals WHERE rater = :rater AND open = 1))
"""


class Store:
    """A store on a disk. Its methods may be called from any thread; each is one transaction.

    Each raises StoreError when the disk or another program is in the way, and then nothing counts as done.
    """

    def __init__(self, database: Database, overlap: int, seed: int) -> None:
        self.database, self.overlap, self.seed = database, overlap, seed

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

    def remembered(self, name: str, given: Any, default: Any = None) -> Any:
        """A fact about the study, as JSON has it: what is given, else what was given before, else the default."""
        return _remembered(self.database, name, given, default)

    def close(self) -> None:
        self.database.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is done in the block is one transaction: faster, and nothing counts before its end."""
        with self.database.transaction("IMMEDIATE"):
            yield

    def add_items(self, rows: Iterable[Answers]) -> int:
        """How many of the rows are new; the others are there already."""
        with self.database.transaction("IMMEDIATE") as db:
            before = db.total_changes
            db.executemany(
                "INSERT INTO items (key, prompt, responses, source) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                ((row.key, _json(row.prompt), _json(row.responses), row.source) for row in rows),
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
        with self.database.transaction("DEFERRED") as db:
            rows = db.execute("SELECT * FROM items ORDER BY number").fetchall()
        return [_item(row) for row in rows]

    def judgements(self) -> list[Judgement]:
        """Those that stand, in the order in which they were made."""
        with self.database.transaction("DEFERRED") as db:
            items = db.execute("SELECT * FROM items").fetchall()
            found = _words(db, "withdrawn_at IS NULL ORDER BY number")
        known = {row["number"]: _item(row) for row in items}  # from here on nobody waits for us
        return [_judgement(row, known[row["item"]]) for row in found]

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
                wanted = {"rater": rater, "overlap": self.overlap, "since": time() - HELD_SECONDS}
                chosen = db.execute(NEXT_ITEM, wanted).fetchone()
                if chosen is None:
                    return None
                item = _item_of(db, chosen["number"])
                order = shuffled(len(item.responses), self.seed, item.number, rater)
                found = _begin(db, rater, item.number, _json(order))
            return _deal(db, found)

    def judge(
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
            answer = as_ranks(ranks, json.loads(found["shown"]))
            said = (None if answer is None else _json(answer), comment, _json(list(dict.fromkeys(tags))))
            before = db.execute("SELECT * FROM judgements WHERE deal = ?", (deal,)).fetchone()
            if before is not None and before["withdrawn_at"] is None and (*before[4:7],) == said:
                return
            if not found["open"]:
                raise Conflict("This item is ranked already, or was put aside: load the page again.")
            looked = max(0.0, min(seconds, time() - found["dealt_at"]))
            db.execute("UPDATE deals SET open = 0 WHERE id = ?", (deal,))
            db.execute(
                "INSERT INTO judgements (deal, item, rater, ranks, comment, tags, seconds, made_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (deal, found["item"], rater, *said, looked, _now()),
            )

    def undo(self, rater: str) -> Deal:
        """Withdraw this rater's last word and deal its item again. Raises Conflict when there is none."""
        with self.database.transaction("IMMEDIATE") as db:
            last = _words(db, "rater = ? AND withdrawn_at IS NULL ORDER BY number DESC LIMIT 1", rater)
            if not last:
                raise Conflict("There is nothing to undo.")
            db.execute("UPDATE judgements SET withdrawn_at = ? WHERE number = ?", (_now(), last[0]["number"]))
            db.execute("UPDATE deals SET open = 0 WHERE rater = ? AND open = 1", (rater,))
            return _deal(db, _begin(db, rater, last[0]["item"], last[0]["shown"]))

    def progress(self, rater: str) -> Progress:
        with self.database.transaction("DEFERRED") as db:
            standing = "SELECT seconds FROM judgements WHERE withdrawn_at IS NULL"
            own = [seconds for (seconds,) in db.execute(f"{standing} AND rater = ?", (rater,))]
            times = own or [seconds for (seconds,) in db.execute(standing)]
            (left,) = db.execute(NUM_LEFT, {"rater": rater, "overlap": self.overlap}).fetchone()
            return Progress(len(own), left, left * median(times) if times else None)


def _remembered(database: Database, name: str, given: Any, default: Any) -> Any:
    """What counts from now on: what is given, else what was given before, else the default."""
    if given is not None:
        with database.transaction("IMMEDIATE") as db:
            db.execute("INSERT OR REPLACE INTO study VALUES (?, ?)", (name, _json(given)))
    with database.transaction("DEFERRED") as db:
        known = db.execute("SELECT value FROM study WHERE name = ?", (name,)).fetchone()
        return json.loads(known["value"]) if known else default


def _words(db: sqlite3.Connection, which: str, *values: Any) -> list[sqlite3.Row]:
    """Judgements, with the order in which the answers were shown."""
    return db.execute(
        f"SELECT judgements.*, (SELECT shown FROM deals WHERE id = deal) AS shown FROM judgements WHERE {which}", values
    ).fetchall()


def _begin(db: sqlite3.Connection, rater: str, item: int, shown: str) -> sqlite3.Row:
    new = (secrets.token_urlsafe(18), item, rater, shown, time())
    db.execute("INSERT INTO deals (id, item, rater, shown, dealt_at) VALUES (?, ?, ?, ?, ?)", new)
    row: sqlite3.Row = db.execute("SELECT * FROM deals WHERE id = ?", new[:1]).fetchone()
    return row


def _deal(db: sqlite3.Connection, row: sqlite3.Row) -> Deal:
    item = _item_of(db, row["item"])
    taken_back = _words(db, "item = ? AND rater = ? ORDER BY number DESC LIMIT 1", row["item"], row["rater"])
    previous = _judgement(taken_back[0], item) if taken_back else None
    return Deal(row["id"], item, tuple(json.loads(row["shown"])), previous)


def _item_of(db: sqlite3.Connection, number: int) -> Item:
    return _item(db.execute("SELECT * FROM items WHERE number = ?", (number,)).fetchone())


def _item(row: sqlite3.Row) -> Item:
    return Item(row["number"], json.loads(row["prompt"]), tuple(json.loads(row["responses"])), row["source"])


def _judgement(row: sqlite3.Row, item: Item) -> Judgement:
    ranks = None if row["ranks"] is None else tuple(json.loads(row["ranks"]))
    shown, tags = tuple(json.loads(row["shown"])), tuple(json.loads(row["tags"]))
    return Judgement(item, row["rater"], ranks, shown, row["seconds"], row["comment"], tags, row["made_at"])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _now() -> str:
    return datetime.fromtimestamp(time(), UTC).isoformat(timespec="seconds")
