"""Detection of a store that lacks its write-ahead log, and of a log that belongs to another file.

SQLite first writes changes to a log beside the file. The single row of table `log` records in the file itself whether
a log is open. It is marked open, with a new id, before the first change is acknowledged. It is marked closed when
all changes are in the file. A file alone is therefore either complete or marked as incomplete.
"""

import secrets
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from keel.errors import DataError

FIRST_MARK = (
    "INSERT OR IGNORE INTO log (only, id, previous, open, changes) VALUES (1, lower(hex(randomblob(8))), '', 0, 0);"
)
NEW_MARK = "UPDATE log SET id = lower(hex(randomblob(8))), previous = '', open = 0"
COPY_ALL_FILES = "copy all files of this name, or take a copy by `keel rank --backup FILE`"


@dataclass(frozen=True)
class LogMark:
    """The row of table `log`."""

    id: str
    previous: str
    open: bool


def log_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def check_log(path: Path) -> Path | None:
    """Check that a store of the current schema has all changes that were written to it.

    A log of another file is renamed if this store needs no log. Otherwise SQLite would write it into the store.

    Returns:
        The new name of such a log, else None.

    Raises:
        DataError: The store's log is missing.
        sqlite3.DatabaseError: The file cannot be read.
    """
    mark, log = _read_mark(path, "immutable=1"), log_path(path)
    size = log.stat().st_size if log.exists() else None
    if size is None and mark.open:
        raise DataError(
            f"{log.name} is missing, and with it the last rankings",
            str(path),
            f"{COPY_ALL_FILES}; to open the store without them: touch {log.name}",
        )
    if not size or _log_belongs(path, mark):
        return None
    if mark.open:
        raise DataError(
            f"{log.name} beside it belongs to another file; the store's own log is missing", str(path), COPY_ALL_FILES
        )
    return _rename_log(log)


def _log_belongs(path: Path, mark: LogMark) -> bool:
    """Return whether the file read with its log continues the state of the file alone."""
    try:
        mark_with_log = _read_mark(path, "mode=ro")  # read-only: SQLite writes nothing of the log into the file
    except (sqlite3.DatabaseError, DataError):
        return False
    return mark.id == mark_with_log.id or (mark.id == mark_with_log.previous and not mark.open)


def _rename_log(log: Path) -> Path:
    target = log.with_name(f"{log.name}.left-over")
    for number in range(2, 1000):
        if not target.exists():
            break
        target = log.with_name(f"{log.name}.left-over-{number}")
    log.rename(target)
    log.with_name(f"{log.name.removesuffix('-wal')}-shm").unlink(missing_ok=True)
    return target


def _read_mark(path: Path, mode: str) -> LogMark:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA trusted_schema = OFF")
        row = connection.execute("SELECT id, previous, open FROM log").fetchone()
    if row is None:
        raise DataError(
            "damaged: table log is empty", str(path), "restore the file from a copy, or choose another store"
        )
    return LogMark(id=str(row["id"]), previous=str(row["previous"]), open=bool(row["open"]))


def note_change(connection: sqlite3.Connection) -> bool:
    """Mark the log as open, inside a transaction that writes.

    Returns:
        Whether the log was closed. If so, write the mark back to the file before anything is acknowledged.
    """
    connection.execute("UPDATE log SET changes = changes + 1")
    opened = connection.execute(
        "UPDATE log SET previous = id, id = ?, open = 1 WHERE open = 0", (secrets.token_hex(8),)
    )
    return opened.rowcount > 0


def write_log_back(connection: sqlite3.Connection, mode: str) -> bool:
    """Write the content of the log into the file (a SQLite checkpoint).

    Args:
        mode: PASSIVE writes what it can without waiting for other connections; TRUNCATE writes everything.

    Returns:
        Whether the entire log is in the file.
    """
    row = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
    return not row["busy"] and row["log"] == row["checkpointed"]


def close_log(connection: sqlite3.Connection) -> None:
    """Write everything into the file and mark the log as closed, unless another program is writing."""
    row = connection.execute("SELECT id, changes FROM log WHERE open = 1").fetchone()
    if row is None or not write_log_back(connection, "TRUNCATE"):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another program may have written since the SELECT. Then the row differs and the log stays open.
        connection.execute("UPDATE log SET open = 0 WHERE id = ? AND changes = ?", (row["id"], row["changes"]))
        connection.execute("COMMIT")
    finally:
        connection.rollback()
    write_log_back(connection, "TRUNCATE")
