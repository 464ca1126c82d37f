"""A store and its write-ahead log, distinguished from a copy that lacks its log and from a log that was left over.

What SQLite writes goes to a log beside the file first. The row of table `log` says in the file itself whether one is
open: it is marked open, with a new id, before the first change is acknowledged, and closed when everything has been
brought into the file. So the file alone is complete, or says that something is missing.
"""

import secrets
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from keel.errors import DataError

FIRST_MARK = "INSERT OR IGNORE INTO log VALUES (1, lower(hex(randomblob(8))), '', 0, 0);"
NEW_MARK = "UPDATE log SET id = lower(hex(randomblob(8))), previous = '', open = 0"
COMPLETE = "copy all files of this name, or take a copy by `keel rank --backup FILE`"


@dataclass(frozen=True)
class Mark:
    """What the row of table `log` says."""

    id: str
    previous: str
    open: bool


def log_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def check_log(path: Path) -> Path | None:
    """Check that a store of the current schema has all that was written to it.

    A log of another file is put aside when this one needs none, so that SQLite does not write it into the store.
    Returns the new name of such a log. Raises DataError when the store's log is missing, sqlite3.DatabaseError when
    the file cannot be read.
    """
    main, log = _mark(path, "immutable=1"), log_path(path)
    size = log.stat().st_size if log.exists() else None
    if size is None and main.open:
        raise DataError(
            f"{log.name} is missing, and with it the last rankings",
            str(path),
            f"{COMPLETE}; without them: touch {log.name}",
        )
    if not size or _belongs(path, main):
        return None
    if main.open:
        raise DataError(f"{log.name} beside it is of another file; its own is missing", str(path), COMPLETE)
    return _put_aside(log)


def _belongs(path: Path, main: Mark) -> bool:
    """Whether the file with its log is a store that continues what the file alone is."""
    try:
        both = _mark(path, "mode=ro")  # read-only: nothing of the log is written into the file
    except (sqlite3.DatabaseError, DataError):
        return False
    return main.id == both.id or (main.id == both.previous and not main.open)


def _put_aside(log: Path) -> Path:
    target = log.with_name(f"{log.name}.left-over")
    for number in range(2, 1000):
        if not target.exists():
            break
        target = log.with_name(f"{log.name}.left-over-{number}")
    log.rename(target)
    log.with_name(f"{log.name.removesuffix('-wal')}-shm").unlink(missing_ok=True)
    return target


def _mark(path: Path, how: str) -> Mark:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as connection:
        connection.execute("PRAGMA trusted_schema = OFF")
        row = connection.execute("SELECT id, previous, open FROM log").fetchone()
    if row is None:
        raise DataError("damaged: table log is empty", str(path), "put a copy of it back, or choose another store")
    return Mark(str(row[0]), str(row[1]), bool(row[2]))


def note_change(connection: sqlite3.Connection) -> bool:
    """Mark the log as open, inside a transaction that writes. Returns whether it was closed: then the mark has to be
    brought into the file before anything is acknowledged."""
    connection.execute("UPDATE log SET changes = changes + 1")
    opened = connection.execute(
        "UPDATE log SET previous = id, id = ?, open = 1 WHERE open = 0", (secrets.token_hex(8),)
    )
    return opened.rowcount > 0


def write_log_back(connection: sqlite3.Connection, how: str) -> bool:
    """Write what the log holds into the file: PASSIVE as far as nobody waits for it, TRUNCATE all of it.

    Returns whether all of it is there.
    """
    busy, pages, done = connection.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
    return not busy and pages == done


def close_log(connection: sqlite3.Connection) -> None:
    """Bring everything into the file and mark the log as closed, unless another program is writing."""
    known = connection.execute("SELECT id, changes FROM log WHERE open = 1").fetchone()
    if known is None or not write_log_back(connection, "TRUNCATE"):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("UPDATE log SET open = 0 WHERE id = ? AND changes = ?", tuple(known))
        connection.execute("COMMIT")
    finally:
        connection.rollback()
    write_log_back(connection, "TRUNCATE")
