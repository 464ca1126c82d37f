"""Whether a SQLite file is a store of this keel, asked before anything in it is obeyed or changed."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from keel.errors import DataError
from keel.files import open_regular
from keel.ranking.newer import COMPLETE, log_path

APPLICATION = 0x6B65656C  # "keel", where SQLite files say whose they are
SCHEMA = 2
SINCE = {"log": 2}
"""Tables that stores before this schema do not have."""
BUSY_SECONDS = 5.0
SCRIPT = Path(__file__).with_name("schema.sql")


def read_schema(path: Path, connection: sqlite3.Connection) -> int:
    """The schema of a store; 0 for an empty file. Raises DataError for what is no store of a known schema.

    What a table, view or trigger of its own would do is not found out: a file that has any is refused.
    """
    connection.execute("BEGIN")  # another program may be beginning it: either nothing of that is seen, or all
    try:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        objects = _objects(connection)
    finally:
        connection.rollback()
    if not pages:
        return 0
    if not objects and application in (0, APPLICATION) and schema <= SCHEMA:
        raise DataError("a copy that lacks its log (-wal), which holds everything", str(path), COMPLETE)
    if application != APPLICATION:
        raise DataError("a database of something else", str(path), "choose another store")
    if not 0 < schema <= SCHEMA:
        raise DataError(f"a store of schema {schema}; this keel knows {SCHEMA}", str(path), "update keel")
    known = {name: sql for name, sql in _known().items() if SINCE.get(name, 1) <= schema}
    strange = sorted(name for name in objects.keys() | known.keys() if objects.get(name) != known.get(name))
    if strange:
        raise DataError(f"{strange[0]!r:.60} is not as keel makes it", str(path), "choose another store")
    return schema


def read_file_schema(path: Path) -> int:
    """The schema of the store in a file; 0 for an empty one. Nothing in the file changes. Raises DataError."""
    if is_logged(path):
        return _schema_alone(path, "immutable=1") or _schema_alone(path, "mode=ro")
    journal = path.with_name(f"{path.name}-journal")  # of a process that was killed when it was making the file
    return _schema_alone(path, "mode=rw" if journal.exists() else "mode=ro")


def is_logged(path: Path) -> bool:
    """Whether the header says that there is a write-ahead log."""
    with open_regular(path) as file:
        return file.read(20)[19:] == b"\2"


def _schema_alone(path: Path, how: str) -> int:
    """Of the file as a connection opened like this sees it: immutable = without its log."""
    with closing(alone(path, how)) as connection:
        if (
            how == "immutable=1"
            and log_path(path).exists()
            and not connection.execute("PRAGMA schema_version").fetchone()[0]
        ):
            return 0  # stores before schema 2 began in their log
        return read_schema(path, connection)


def check_alone(path: Path) -> None:
    """Look for damage with a connection that writes nothing, before one that writes the log into the file."""
    how = "mode=ro" if log_path(path).exists() or not is_logged(path) else "immutable=1"
    with closing(alone(path, how)) as connection:
        check_content(path, connection)


def alone(path: Path, how: str) -> sqlite3.Connection:
    """A connection to the file; immutable = without its log."""
    place = f"{path.absolute().as_uri()}?{how}"
    return sqlite3.connect(place, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


def check_content(path: Path, connection: sqlite3.Connection) -> None:
    """Raises DataError for a file whose pages or references do not fit together, as in one copied during a write."""
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict == "ok" and connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
        verdict = "a row refers to one that is missing"
    if verdict != "ok":
        raise DataError(f"damaged: {verdict}", str(path), "put a copy of it back, or choose another store")


def _known() -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCRIPT.read_text(encoding="utf-8"))
        return _objects(connection)


def _objects(connection: sqlite3.Connection) -> dict[str, str]:
    """Name -> statement of each table, index, view and trigger, without comments and spaces; SQLite's statistics and
    its own indices aside."""
    rows = connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    return {
        str(name): re.sub(r"\s+", "", re.sub(r"--[^\n]*", "", str(sql)))
        for name, sql in rows
        if not str(name).startswith("sqlite_stat")
    }
