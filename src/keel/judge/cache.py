"""The replies of judges in one SQLite file, which several processes can share and a killed one leaves readable."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from keel.errors import ConfigError, RewardError
from keel.files import open_regular

APPLICATION = 0x6B6A6467  # "kjdg", in the header field in which a SQLite file names its application
BUSY_SECONDS = 30.0
MAGIC = b"SQLite format 3\0"
TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY NOT NULL, model TEXT NOT NULL, reply TEXT NOT NULL)"


class ReplyCache:
    """Replies by the hash of their question. Each is one transaction, so a kill loses none that was recorded."""

    def __init__(self, path: str) -> None:
        """Open the file, or create it. Raises ConfigError for a file of another kind, or one that cannot be used."""
        self.path = Path(path)
        try:
            self._refuse_other_files()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Threads: a notebook waits for replies in another one. There is one at a time.
            self.db = sqlite3.connect(self.path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._prepare()
        except (sqlite3.Error, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot use the cache: {reason}", path, "choose another judge.cache") from error

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the recorded replies of these questions. Raises RewardError."""
        with self._raises_reward_error():
            rows = [self.db.execute("SELECT key, reply FROM replies WHERE key = ?", (key,)).fetchone() for key in keys]
        return dict(row for row in rows if row is not None)

    def record(self, key: str, model: str, reply: str) -> None:
        """Record a reply. The first one to a question stays. Raises RewardError."""
        with self._raises_reward_error():
            self.db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, model, reply))

    def _refuse_other_files(self) -> None:
        """Refuse a file of other content, which SQLite overwrites if it is short."""
        if self.path.exists():
            with open_regular(self.path) as file:
                if file.read(len(MAGIC)) not in (b"", MAGIC):
                    raise ConfigError("not a cache of replies", str(self.path), "choose another judge.cache")

    def _prepare(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")  # one process creates the table; the others wait
        try:
            (application,) = self.db.execute("PRAGMA application_id").fetchone()
            (objects,) = self.db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
            if objects and application != APPLICATION:
                raise ConfigError("a database of another program", str(self.path), "choose another judge.cache")
            self.db.execute(TABLE)
            self.db.execute(f"PRAGMA application_id = {APPLICATION}")
            self.db.execute("COMMIT")
        finally:
            self.db.rollback()  # has no effect after a commit

    @contextmanager
    def _raises_reward_error(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RewardError(f"cannot use the cache: {error}", str(self.path), "choose another judge.cache") from error
