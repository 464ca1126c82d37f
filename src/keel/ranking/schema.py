"""Checks that a SQLite file is a store of this keel, before anything in the file is used or changed."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from keel.errors import DataError
from keel.files import open_regular
from keel.ranking.log_marks import COPY_ALL_FILES, log_path

APPLICATION = 0x6B65656C  # "keel", in the header field in which a SQLite file names its application
SCHEMA = 2
SINCE = {"log": 2}
"""Table -> first schema that has it, for tables that schema 1 lacks."""
BUSY_SECONDS = 5.0
SCRIPT = Path(__file__).with_name("schema.sql")


def read_schema(path: Path, connection: sqlite3.Connection) -> int:
    """Return the schema number of a store, or 0 for an empty file.

    A file that has a table, index, view or trigger of its own is refused. What they would do is not examined.

    Raises:
        DataError: The file is not a store of a known schema.
    """
    # One transaction: while another program creates the store, this sees all of the new tables or none.
    connection.execute("BEGIN")
    try:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        objects = _read_objects(connection)
    finally:
        connection.rollback()
    if not pages:
        return 0
    if not objects and application in (0, APPLICATION) and schema <= SCHEMA:
        raise DataError("a copy that lacks its log (-wal), which holds everything", str(path), COPY_ALL_FILES)
    if application != APPLICATION:
        raise DataError("a database of another program", str(path), "choose another store")
    if not 0 < schema <= SCHEMA:
        raise DataError(f"a store of schema {schema}; this keel knows {SCHEMA}", str(path), "update keel")
    expected = {name: sql for name, sql in _expected_objects().items() if SINCE.get(name, 1) <= schema}
    unexpected = sorted(name for name in objects.keys() | expected.keys() if objects.get(name) != expected.get(name))
    if unexpected:
        raise DataError(f"{unexpected[0]!r:.60} is not as keel makes it", str(path), "choose another store")
    return schema


def read_file_schema(path: Path) -> int:
    """Return the schema number of the store in a file, or 0 for an empty file, without changing the file.

    Raises DataError.
    """
    if has_log(path):
        return _read_schema_only(path, "immutable=1") or _read_schema_only(path, "mode=ro")
    # A process that was killed while it created the file leaves a journal, which a read-only connection cannot undo.
    journal = path.with_name(f"{path.name}-journal")
    return _read_schema_only(path, "mode=rw" if journal.exists() else "mode=ro")


def has_log(path: Path) -> bool:
    """Return whether the header of the file announces a write-ahead log (byte 19, the read version, is 2)."""
    with open_regular(path) as file:
        return file.read(20)[19:] == b"\2"


def _read_schema_only(path: Path, mode: str) -> int:
    with closing(connect_with_mode(path, mode)) as connection:
        if (
            mode == "immutable=1"
            and log_path(path).exists()
            and not connection.execute("PRAGMA schema_version").fetchone()[0]
        ):
            return 0  # stores before schema 2 were created in their log
        return read_schema(path, connection)


def check_file_content(path: Path) -> None:
    """Check a file for damage through a connection that writes nothing.

    The connection that is opened afterwards may write the log into the file. Raises DataError.
    """
    mode = "mode=ro" if log_path(path).exists() or not has_log(path) else "immutable=1"
    with closing(connect_with_mode(path, mode)) as connection:
        check_content(path, connection)


def connect_with_mode(path: Path, mode: str) -> sqlite3.Connection:
    """Connect with a URI parameter of SQLite: mode=ro, mode=rw, or immutable=1 (the file without its log)."""
    uri = f"{path.absolute().as_uri()}?{mode}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


def check_content(path: Path, connection: sqlite3.Connection) -> None:
    """Raise DataError if pages or references do not fit together, as in a file that was copied during a write."""
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict == "ok" and connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
        verdict = "a row refers to one that is missing"
    if verdict != "ok":
        raise DataError(f"damaged: {verdict}", str(path), "restore the file from a copy, or choose another store")


def _expected_objects() -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCRIPT.read_text(encoding="utf-8"))
        return _read_objects(connection)


def _read_objects(connection: sqlite3.Connection) -> dict[str, str]:
    """Return name -> SQL statement of each table, index, view and trigger, without comments and white space.

    SQLite's own indices have no SQL. Its statistics tables (sqlite_stat1 ...) are left out.
    """
    objects = connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    return {
        str(name): re.sub(r"\s+", "", re.sub(r"--[^\n]*", "", str(sql)))
        for name, sql in objects
        if not str(name).startswith("sqlite_stat")
    }
