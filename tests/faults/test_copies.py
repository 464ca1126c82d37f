"""F-22: a store that is copied, at any moment and with any of its files, is complete or refused."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from keel.cli.main import main
from keel.data.items import UnrankedResponses
from keel.errors import DataError, KeelError
from keel.ranking.store import Store

ROWS = [UnrankedResponses(f"question {i}", (f"{i}a", f"{i}b")) for i in range(60)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """In use, with nothing ranked."""
    with closing(Store.open(str(tmp_path / "ratings.db"))) as store:
        store.add_items(ROWS)
        store.add_raters(["anna"])
        yield store


def rank(store: Store, times: int) -> None:
    for _ in range(times):
        deal = store.deal("anna")
        assert deal is not None
        store.record_judgement("anna", deal.id, [1, 2], "a comment")


def copied(store: Store, name: str, *endings: str) -> Path:
    """A copy under this name of the file, and of those beside it with these endings."""
    target = store.database.path.with_name(name)
    for ending in ("", *endings):
        shutil.copy(f"{store.database.path}{ending}", f"{target}{ending}")
    return target


def num_ranked(path: Path) -> int:
    with closing(Store.open(str(path))) as store:
        return store.num_judgements()


def left_over(store: Store, target: Path) -> None:
    """Lay this store's log beside another file."""
    shutil.copy(f"{store.database.path}-wal", f"{target}-wal")


def test_a_copy_without_its_log_is_refused_and_with_it_complete(store: Store):
    rank(store, 3)
    alone, both = copied(store, "alone.db"), copied(store, "both.db", "-wal")
    before = alone.read_bytes()
    with pytest.raises(DataError, match=r"alone.db-wal is missing"):
        Store.open(str(alone))
    assert alone.read_bytes() == before
    assert [each.name for each in alone.parent.glob("alone.db*")] == ["alone.db"]
    assert num_ranked(both) == 3


def test_a_new_store_says_of_itself_what_it_is_before_anything_is_in_it(tmp_path: Path):
    with closing(Store.open(str(tmp_path / "ratings.db"))) as store:
        assert num_ranked(copied(store, "copy.db")) == 0
        store.add_items(ROWS)
        alone = copied(store, "alone.db")
    with pytest.raises(DataError, match=r"alone.db-wal is missing"):
        Store.open(str(alone))


def test_an_idle_store_is_one_file(store: Store):
    rank(store, 3)
    store.rest(1000.0)  # not yet
    with pytest.raises(DataError, match="missing"):
        Store.open(str(copied(store, "early.db")))
    store.rest(0.0)
    assert num_ranked(copied(store, "late.db")) == 3
    rank(store, 1)
    assert store.num_judgements() == 4


def test_a_closed_store_is_one_file(store: Store):
    rank(store, 3)
    store.close()
    assert num_ranked(copied(store, "copy.db")) == 3


def test_a_backup_is_complete_while_the_store_is_in_use(store: Store, capsys: pytest.CaptureFixture[str]):
    rank(store, 3)
    target = store.database.path.with_name("monday.db")
    arguments = ["rank", "--store", str(store.database.path), "--backup", str(target)]
    assert main(arguments) == 0
    rank(store, 2)
    assert target.stat().st_mode & 0o777 == 0o600
    assert (num_ranked(target), store.num_judgements()) == (3, 5)
    assert main(arguments) == 2  # never over another file
    assert "exists" in capsys.readouterr().err
    assert num_ranked(target) == 3


@pytest.mark.parametrize("older", ["backup", "idle copy"])
def test_an_older_copy_beside_a_log_that_was_left_over(store: Store, older: str, capsys: pytest.CaptureFixture[str]):
    rank(store, 2)
    target = store.database.path.with_name("older.db")
    if older == "backup":
        store.backup(str(target))
    else:
        store.rest(0.0)
        copied(store, "older.db")
    for _ in range(2):  # the log now is not the one that followed the copy
        rank(store, 3)
        store.rest(0.0)
    rank(store, 3)
    left_over(store, target)
    assert main(["rank", "--stats", "--json", "--store", str(target)]) == 0
    assert "older.db-wal.left-over" in capsys.readouterr().err
    assert num_ranked(target) == 2


def test_a_log_that_follows_the_copy_brings_what_came_later(store: Store):
    rank(store, 2)
    store.rest(0.0)
    target = copied(store, "older.db")
    rank(store, 3)
    left_over(store, target)
    assert num_ranked(target) == 5


def test_a_copy_beside_the_log_of_another_is_refused(store: Store):
    rank(store, 2)
    target = copied(store, "older.db")
    store.rest(0.0)
    rank(store, 3)
    left_over(store, target)
    with pytest.raises(DataError, match="belongs to another file"):
        Store.open(str(target))
    assert target.with_name("older.db-wal").exists()


@pytest.mark.parametrize("tables", [True, False], ids=["of schema 1", "of schema 1, all of it in its log"])
def test_a_store_of_the_schema_before_is_read(tmp_path: Path, tables: bool):
    path = tmp_path / "ratings.db"
    with closing(Store.open(str(path))) as store:
        store.add_items(ROWS)
        store.add_raters(["anna"])
        rank(store, 2)
    begun = "import os, sqlite3, sys; sqlite3.connect(sys.argv[1], isolation_level=None).executescript(sys.argv[2])"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        script = "PRAGMA journal_mode = WAL; BEGIN;" + "\n".join(db.iterdump()).replace("BEGIN TRANSACTION;", "")
    script = script.replace(
        "COMMIT;", "DROP TABLE log; PRAGMA application_id = 1801807212; PRAGMA user_version = 1; COMMIT;"
    )
    old = tmp_path / "old.db"
    subprocess.run([sys.executable, "-c", f"{begun}; os._exit(0)", str(old), script], check=True)  # as if killed
    if tables:
        with closing(sqlite3.connect(old)) as db:
            db.execute("SELECT * FROM items").fetchone()  # and the log is brought in
    else:
        shutil.copy(old, tmp_path / "alone.db")
        with pytest.raises(DataError, match="lacks its log"):
            Store.open(str(tmp_path / "alone.db"))
    assert num_ranked(old) == 2
    assert num_ranked(old) == 2


# ---- stores that others made -----------------------------------------------------------------------------------------

FOREIGN = {
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON judgements BEGIN DELETE FROM judgements; END",
    "a view": "CREATE VIEW v AS SELECT 1",
    "an endless view in place of a table": "DROP TABLE study; CREATE VIEW study AS WITH RECURSIVE c(name, value) AS "
    "(SELECT 'a', '1' UNION ALL SELECT name, value FROM c) SELECT * FROM c",
    "a table more": "CREATE TABLE mine (x)",
    "a table less": "DROP TABLE owner",
    "other columns": "DROP TABLE owner; CREATE TABLE owner (only INTEGER, token TEXT, more TEXT)",
    "an index less": "DROP INDEX one_word_each",
    "no mark": "DELETE FROM log",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_store_is_refused_before_anything_in_it_runs(tmp_path: Path, name: str):
    path = tmp_path / "ratings.db"
    Store.open(str(path)).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(FOREIGN[name])
    before = path.read_bytes()
    with pytest.raises(KeelError):
        Store.open(str(path))
    assert path.read_bytes() == before


WRONG = {
    "ranks too short": "UPDATE judgements SET ranks = '[1]'",
    "ranks of text": 'UPDATE judgements SET ranks = \'["a", "b"]\'',
    "ranks no JSON": "UPDATE judgements SET ranks = '[1, 2'",
    "shown twice": "UPDATE deals SET shown = '[0, 0]'",
    "shown out of range": "UPDATE deals SET shown = '[0, 7]'",
    "one response": "UPDATE items SET responses = '[\"a\"]'",
    "responses of numbers": "UPDATE items SET responses = '[1, 2]'",
    "a prompt that is neither": "UPDATE items SET prompt = '7'",
    "bytes": "UPDATE items SET responses = x'00ff'",
    "seconds of text": "UPDATE judgements SET seconds = 'long'",
    "deep": f"UPDATE items SET responses = '{'[' * 100_000}'",
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_do_not_fit_are_named(store: Store, name: str, capsys: pytest.CaptureFixture[str]):
    rank(store, 2)
    store.close()
    path = str(store.database.path)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(WRONG[name])
    for flags in (["--stats"], ["--export", str(store.database.path.with_name("out.jsonl"))]):
        assert main(["rank", "--store", path, *flags]) == 2
        assert f"{path}: " in capsys.readouterr().err


@pytest.mark.parametrize("statement", ["UPDATE deals SET item = 9999", "DELETE FROM items WHERE number = 1"])
def test_references_to_nothing_are_refused(store: Store, statement: str):
    rank(store, 2)
    store.close()
    with closing(sqlite3.connect(store.database.path, isolation_level=None)) as db:
        db.executescript(statement)
    with pytest.raises(DataError, match="damaged"):
        Store.open(str(store.database.path))
