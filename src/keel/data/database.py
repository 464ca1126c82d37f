"""A SQLite file that keeps what it has acknowledged: synced at every commit, and still in its place afterwards."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from keel.errors import DataError, KeelError

APPLICATION = 0x6B65656C  # "keel", where SQLite files say whose they are
SCHEMA = 1
MAGIC = b"SQLite format 3\0"
BUSY_SECONDS = 5.0
SCRIPT = Path(__file__).with_name("schema.sql")


class StoreError(KeelError, OSError):
    """The store cannot be written or read just now; what was asked is not acknowledged, and may be asked again."""

    exit_code = 5


class Database:
    """One connection, used by one thread at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self.connection = path, connection
        self.turn = threading.RLock()
        self.files = self._files()

    @classmethod
    def open(cls, path: Path) -> "Database":
        """The database in this file, which is made, for its owner's eyes alone, where there is none.

        Raises DataError for a file that is something else, StoreError when it cannot be read now.
        """
        _begin(path)
        with _explained(path):
            connection = sqlite3.connect(
                path.absolute(), timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            connection.row_factory = sqlite3.Row
            try:
                _prepare(path, connection)
                return cls(path, connection)
            except BaseException:
                connection.close()
                raise

    def close(self) -> None:
        with self.turn:
            self.connection.close()

    def __del__(self) -> None:
        self.connection.close()

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
                    yield self.connection
                    self.connection.execute("COMMIT")
                finally:
                    self.connection.rollback()  # nothing to do after a commit
            if self._files() != self.files:
                raise StoreError(
                    "the file was deleted or replaced", str(self.path), "stop keel rank, put it back, start again"
                )
        finally:
            self.turn.release()

    def _files(self) -> list[tuple[int, int] | None]:
        """Which files the names mean now. A commit into files without a name is lost with the process."""
        return [_identity(self.path), _identity(self.path.with_name(f"{self.path.name}-wal"))]


def _begin(path: Path) -> None:
    """Make the file if there is none; refuse one of other content, which SQLite would write over if it is short."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        with path.open("rb") as file:
            beginning = file.read(len(MAGIC))
    except OSError as error:
        raise DataError(f"cannot open it: {error.strerror}", str(path), "choose another store") from error
    if beginning not in (b"", MAGIC):
        raise DataError("not a database", str(path), "choose another store")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse what is not ours before anything in it changes; begin what is new."""
    connection.execute("BEGIN")  # another program may be beginning it: either nothing of that is seen, or all
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    connection.execute("COMMIT")
    new = (application, schema, tables) == (0, 0, 0)
    if not new and application != APPLICATION:
        raise DataError("a database of something else", str(path), "choose another store")
    if not new and schema != SCHEMA:
        raise DataError(f"a store of schema {schema}; this keel knows {SCHEMA}", str(path), "update keel")
    _keep_a_log(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if new:
        connection.executescript(
            f"BEGIN IMMEDIATE; {SCRIPT.read_text(encoding='utf-8')}"
            f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA}; COMMIT;"
        )
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise DataError(f"damaged: {verdict}", str(path), "put a copy of it back, or choose another store")


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
