"""A SQLite file that keeps what it has acknowledged: synced at every commit, and still in its place afterwards."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal

from keel.errors import DataError, KeelError
from keel.files import open_regular
from keel.ranking.newer import FIRST_MARK, NEW_MARK, check_log, close_log, log_path, note_change, write_log_back
from keel.ranking.schema import (
    APPLICATION,
    BUSY_SECONDS,
    SCHEMA,
    SCRIPT,
    alone,
    check_alone,
    read_file_schema,
    read_schema,
)

MAGIC = b"SQLite format 3\0"
LONGEST_LOG = 16 * 2**20  # bytes, after which a log is brought into the file though it is in use


class StoreError(KeelError, OSError):
    """The store cannot be written or read just now; what was asked is not acknowledged, and may be asked again."""

    exit_code = 5


class Database:
    """One connection, used by one thread at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection, left_over: Path | None = None) -> None:
        self.path, self.connection = path, connection
        self.left_over = left_over
        """A log of another file, put aside under this name."""
        self.turn = threading.RLock()
        self.files = self._files()
        self.changed = time.monotonic()
        self.unmarked = False  # whether the file itself does not yet say that its log is open

    @classmethod
    def open(cls, path: Path) -> "Database":
        """The database in this file, which is made, for its owner's eyes alone, where there is none.

        Raises DataError for a file that is something else, StoreError when it cannot be read now.
        """
        with _explained(path):
            schema = _begin(path)
            left_over = check_log(path) if schema == SCHEMA else None
            if schema:
                check_alone(path)
            connection = _connect(path)
            try:
                _prepare(path, connection)
                return cls(path, connection, left_over)
            except BaseException:
                connection.close()
                raise

    @classmethod
    def reading(cls, path: Path) -> "Database":
        """A store that another connection has open and has checked, to read it alone. Raises StoreError."""
        with _explained(path):
            connection = alone(path, "mode=ro")
            connection.row_factory = sqlite3.Row
            return cls(path, connection)

    def close(self) -> None:
        """Leave everything in the one file, if no other program is using it."""
        with self.turn:
            with suppress(sqlite3.Error):  # what was acknowledged is in the log, and stays there
                close_log(self.connection)
            self.connection.close()

    def __del__(self) -> None:
        self.close()

    def rest(self, seconds: float) -> None:
        """Bring everything into the one file when nothing was written for so long. Raises StoreError."""
        with self.turn, _explained(self.path):
            if time.monotonic() - self.changed >= seconds and not self.connection.in_transaction:
                close_log(self.connection)

    def backup(self, target: Path) -> None:
        """Write a self-contained snapshot of the database to a new file. Raises StoreError, OSError."""
        partial = target.with_name(f".{target.name}.tmp")
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL, 0o600))
        try:
            with self.turn, _explained(self.path), closing(sqlite3.connect(partial, isolation_level=None)) as copy:
                self.connection.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
                copy.execute(NEW_MARK)
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def transaction(self, begin: Literal["IMMEDIATE", "DEFERRED"]) -> Iterator[sqlite3.Connection]:
        """What the block changes (IMMEDIATE) is on the disk when it ends; what it reads (DEFERRED) is of one moment.

        Raises StoreError; then nothing may be acknowledged.
        """
        if not self.turn.acquire(timeout=BUSY_SECONDS):
            raise StoreError("too many are waiting for it", str(self.path), "try again in a moment")
        try:
            if self.connection.in_transaction:  # this thread's own: all of it counts, or nothing
                yield self.connection
                return
            with _explained(self.path):
                self.connection.execute(f"BEGIN {begin}")
                try:
                    before = self.connection.total_changes
                    yield self.connection
                    changed = self.connection.total_changes > before
                    opened = changed and note_change(self.connection)
                    self.connection.execute("COMMIT")
                finally:
                    self.connection.rollback()  # nothing to do after a commit
                if changed:
                    self._after_change(opened)
            if self._files() != self.files:
                raise StoreError(
                    "the file was deleted or replaced", str(self.path), "stop keel rank, put it back, start again"
                )
        finally:
            self.turn.release()

    def _after_change(self, opened: bool) -> None:
        """Have the file itself say that there is a log; empty a log that has grown long."""
        self.changed = time.monotonic()
        if opened or self.unmarked:
            self.unmarked = not write_log_back(self.connection, "PASSIVE")
        with suppress(FileNotFoundError):  # which the caller says
            if log_path(self.path).stat().st_size > LONGEST_LOG:
                close_log(self.connection)

    def _files(self) -> list[tuple[int, int] | None]:
        """Which files the names mean now. A commit into files without a name is lost with the process."""
        return [_identity(self.path), _identity(log_path(self.path))]


def _begin(path: Path) -> int:
    """Make the file if there is none; refuse one of other content, which SQLite would write over if it is short.

    Returns the schema of the store in it, 0 for a new one. Raises DataError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        with open_regular(path) as file:
            beginning = file.read(len(MAGIC))
    except OSError as error:
        raise DataError(f"cannot open it: {error.strerror}", str(path), "choose another store") from error
    if beginning not in (b"", MAGIC):
        raise DataError("not a database", str(path), "choose another store")
    return read_file_schema(path)


def _identity(path: Path) -> tuple[int, int] | None:
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
    """Refuse what is not ours before anything in it changes; begin what is new, in the file itself and not its log."""
    schema = read_schema(path, connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if schema < SCHEMA:
        connection.executescript(
            f"BEGIN IMMEDIATE; {SCRIPT.read_text(encoding='utf-8')} {FIRST_MARK}"
            f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA}; COMMIT;"
        )
    _keep_a_log(connection)
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # the file changes only between two logs
    connection.execute("SELECT id FROM log").fetchone()  # from here on the log has a file
    if schema in range(1, SCHEMA):
        write_log_back(connection, "TRUNCATE")


def _keep_a_log(connection: sqlite3.Connection) -> None:
    """The one change for which SQLite does not itself wait until others are done with the file."""
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
def _explained(path: Path) -> Iterator[None]:
    """SQLite's failures in a person's words. What is wrong with our own statements stays what it is."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise
    except sqlite3.DatabaseError as error:
        code, place = error.sqlite_errorname.removeprefix("SQLITE_"), str(path)
        match code.partition("_")[0]:
            case "CORRUPT" | "NOTADB":
                raise StoreError("damaged", place, "put a copy of it back") from error
            case "BUSY" | "LOCKED":
                what = f"another program has kept it locked for {BUSY_SECONDS:g} s"
                raise StoreError(what, place, "close what else has it open") from error
            case "FULL":
                raise StoreError("the disk is full", place, "free some space") from error
            case _:
                raise StoreError(str(error), place, "repair the storage, then start again") from error
