"""A SQLite file that does not lose acknowledged changes.

Each commit is synced, and the file is checked afterwards to be still the one that its name refers to.
"""

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal

from keel.errors import DataError, KeelError
from keel.files import open_regular
from keel.ranking.log_marks import FIRST_MARK, NEW_MARK, check_log, close_log, log_path, note_change, write_log_back
from keel.ranking.schema import (
    APPLICATION,
    BUSY_SECONDS,
    SCHEMA,
    SCRIPT,
    check_file_content,
    connect_with_mode,
    read_file_schema,
    read_schema,
)

MAGIC = b"SQLite format 3\0"
LONGEST_LOG = 16 * 2**20  # bytes; a longer log is written back at once, although the store is in use


class StoreError(KeelError, OSError):
    """The store cannot be read or written at present. The request is not acknowledged, and may be repeated."""

    exit_code = 5


class Database:
    """One connection to the file, used by one thread at a time. Whoever opens it closes it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, left_over: Path | None = None) -> None:
        self.path, self.connection = path, connection
        self.left_over = left_over
        """New name of a log that belonged to another file and was renamed."""
        self.lock = threading.RLock()
        self.files = self._file_identities()
        self.changed = time.monotonic()
        self.num_rollbacks = 0  # of transactions that had changed something: what was read in them may not be true
        self.mark_pending = False  # the log is marked as open in the log itself, but not yet in the file
        # A fallback for an owner that forgets close(), at the latest at exit. Without it, SQLite removes the log with
        # its last connection while the file is still marked as having one, and the store would be refused. It is not
        # __del__, because in a reference cycle the connection may be finalized before the database.
        self._close_once = weakref.finalize(self, _close, self.lock, connection)

    @classmethod
    def open(cls, path: Path) -> "Database":
        """Open the database in this file. Create the file, readable by its owner only, if there is none.

        Raises:
            DataError: The file is not a store.
            StoreError: The file cannot be read at present.
        """
        with _raises_store_error(path):
            schema = _create_if_missing(path)
            left_over = check_log(path) if schema == SCHEMA else None
            if schema:
                check_file_content(path)
            connection = _connect(path)
            try:
                _prepare(path, connection)
                return cls(path, connection, left_over)
            except BaseException:
                connection.close()
                raise

    @classmethod
    def reading(cls, path: Path) -> "Database":
        """Open, for reading only, a store that another connection has open and has checked. Raises StoreError."""
        with _raises_store_error(path):
            connection = connect_with_mode(path, "mode=ro")
            connection.row_factory = sqlite3.Row
            return cls(path, connection)

    def close(self) -> None:
        """Write the log into the file, unless another program uses it, and close the connection."""
        self._close_once()

    def rest(self, seconds: float) -> None:
        """Write the log into the file if nothing was written for this many seconds. Raises StoreError."""
        with self.lock, _raises_store_error(self.path):
            if time.monotonic() - self.changed >= seconds and not self.connection.in_transaction:
                close_log(self.connection)

    def backup(self, target: Path) -> None:
        """Write a self-contained snapshot of the database to a new file. Raises StoreError, OSError."""
        partial = target.with_name(f".{target.name}.tmp")
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL, 0o600))
        try:
            with (
                self.lock,
                _raises_store_error(self.path),
                closing(sqlite3.connect(partial, isolation_level=None)) as copy,
            ):
                self.connection.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
                copy.execute(NEW_MARK)
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def transaction(self, begin: Literal["IMMEDIATE", "DEFERRED"]) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction.

        Changes of the block are on the disk when it ends. If this raises, acknowledge nothing.

        Args:
            begin: IMMEDIATE for a block that writes; DEFERRED for one that reads, which then sees one snapshot.

        Raises:
            StoreError: The store cannot be used at present, or its file was deleted or replaced.
        """
        if not self.lock.acquire(timeout=BUSY_SECONDS):
            raise StoreError("too many requests are waiting for it", str(self.path), "try again in a moment")
        try:
            if self.connection.in_transaction:  # nested in a transaction of this thread: the outer block commits
                yield self.connection
                return
            with _raises_store_error(self.path):
                self.connection.execute(f"BEGIN {begin}")
                previous_changes = self.connection.total_changes
                try:
                    yield self.connection
                    changed = self.connection.total_changes > previous_changes
                    opened = changed and note_change(self.connection)
                    self.connection.execute("COMMIT")
                except BaseException:
                    self.num_rollbacks += self.connection.total_changes > previous_changes
                    raise
                finally:
                    self.connection.rollback()  # has no effect after a commit
                if changed:
                    self._after_change(opened)
            if self._file_identities() != self.files:
                raise StoreError(
                    "the file was deleted or replaced", str(self.path), "stop keel rank, restore the file, start again"
                )
        finally:
            self.lock.release()

    def _after_change(self, opened: bool) -> None:
        """Write the mark of an open log to the file; empty a long log."""
        self.changed = time.monotonic()
        if opened or self.mark_pending:
            self.mark_pending = not write_log_back(self.connection, "PASSIVE")
        with suppress(FileNotFoundError):  # the caller compares the files and reports it
            if log_path(self.path).stat().st_size > LONGEST_LOG:
                close_log(self.connection)

    def _file_identities(self) -> list[tuple[int, int] | None]:
        """Return device and inode of the store and its log.

        If they change, the open files have lost their names, and commits to them would be lost with the process.
        """
        return [_file_identity(self.path), _file_identity(log_path(self.path))]


def _close(lock: threading.RLock, connection: sqlite3.Connection) -> None:
    if not lock.acquire(timeout=BUSY_SECONDS):  # at exit, a thread in the middle of a transaction may hold it
        return
    try:
        with suppress(sqlite3.Error):  # acknowledged changes are in the log, and stay there
            close_log(connection)
        connection.close()
    finally:
        lock.release()


def _create_if_missing(path: Path) -> int:
    """Create the file if there is none, and refuse a file of other content, which SQLite overwrites if it is short.

    Returns:
        The schema number of the store in the file; 0 for a new file.

    Raises:
        DataError: The file cannot be opened, or is not a store.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        with open_regular(path) as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise DataError(f"cannot open it: {error.strerror}", str(path), "choose another store") from error
    if magic not in (b"", MAGIC):
        raise DataError("not a database", str(path), "choose another store")
    return read_file_schema(path)


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path.absolute(), timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    """Check the schema before anything in the file changes, then create or upgrade the tables.

    The tables are created before the log is switched on, so they are in the file itself.
    """
    schema = read_schema(path, connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if schema < SCHEMA:
        connection.executescript(
            f"BEGIN IMMEDIATE; {SCRIPT.read_text(encoding='utf-8')} {FIRST_MARK}"
            f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA}; COMMIT;"
        )
    _switch_to_log(connection)
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # keel alone decides when the log is written back
    connection.execute("SELECT id FROM log").fetchone()  # a read makes SQLite create the log's file
    if schema in range(1, SCHEMA):
        write_log_back(connection, "TRUNCATE")


def _switch_to_log(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. SQLite's busy timeout does not apply to this statement, so retry here."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


@contextmanager
def _raises_store_error(path: Path) -> Iterator[None]:
    """Convert SQLite's errors to StoreError. Errors in keel's own statements pass unchanged."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise
    except sqlite3.DatabaseError as error:
        code, place = error.sqlite_errorname.removeprefix("SQLITE_"), str(path)
        match code.partition("_")[0]:
            case "CORRUPT" | "NOTADB":
                raise StoreError("damaged", place, "restore the file from a copy") from error
            case "BUSY" | "LOCKED":
                what = f"another program has kept it locked for {BUSY_SECONDS:g} s"
                raise StoreError(what, place, "close the other program") from error
            case "FULL":
                raise StoreError("the disk is full", place, "free some space") from error
            case _:
                raise StoreError(str(error), place, "repair the storage, then start again") from error
