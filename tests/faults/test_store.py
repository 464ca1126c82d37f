"""F-22, F-23: rankings that were acknowledged are there, once, whatever happens to the server, the file, the disk."""

import json
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from keel.cli.main import main
from keel.data.items import UnrankedResponses
from keel.errors import DataError
from keel.ranking.database import StoreError
from keel.ranking.store import Store
from keel.web.rank.app import private_links

from ..web.visits import Loaded, Process, Study, Visitor, free_port, serving, study

SAID = tuple[str, str, tuple[int | None, ...] | None]  # rater, deal, ranks in the order shown


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


class Rater(threading.Thread):
    """Ranks until it has done its number, and asks again whenever the server is away."""

    def __init__(self, name: str, link: str, number: int) -> None:
        super().__init__(daemon=True)
        self.rater, self.link, self.number = name, link, number
        self.acknowledged: list[SAID] = []
        self.draw = random.Random(name)
        self.strange: list[str] = []

    def run(self) -> None:
        with httpx.Client(timeout=20) as client:
            visitor = Visitor(client, self.link)
            self.patiently(visitor.enter)
            while len(self.acknowledged) < self.number and not self.strange:
                self.rank_one(visitor)

    def rank_one(self, visitor: Visitor) -> None:
        page = self.patiently(visitor.load)
        ranks = self.draw.choice([None, [1, 2, 3], [2, 1, 1], [None, 1, 2], [3, 1, 2], [1, 1, 1]])
        answer = self.patiently(lambda: visitor.say(page, ranks, comment=f"by {self.rater}"))
        if answer.status_code != 200:
            self.strange.append(f"{answer.status_code} {answer.text}")
            return
        self.acknowledged.append((self.rater, page.deal, ranks and tuple(ranks)))
        if self.draw.random() < 0.2:  # a double click
            assert self.patiently(lambda: visitor.say(page, ranks, comment=f"by {self.rater}")).status_code == 200

    def patiently(self, ask: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 120
        while True:
            try:
                return ask()
            except httpx.TransportError:
                assert time.monotonic() < deadline, "the server does not come back"
                time.sleep(0.02)


def ranked_under_kills(folder: Path, num_raters: int, each: int, kills: int) -> tuple[list[SAID], Path]:
    """What was acknowledged to raters who rank in parallel while the server is killed at random moments."""
    store, port, draw = folder / "ratings.db", free_port(), random.Random(each)
    answers = folder / "answers.jsonl"
    rows = [{"prompt": f"question {i}", "responses": [f"{i}a", f"{i}b", f"{i}c"]} for i in range(each)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"rater {i}" for i in range(num_raters)]
    flags = [str(answers), f"--overlap={num_raters}", *(f"--raters={name}" for name in names)]
    server = Process.start(store, port, *flags)
    raters = [Rater(name, server.links[name], each) for name in names]
    for rater in raters:
        rater.start()
    for kill in range(1, kills + 1):
        due = kill * num_raters * each * 0.95 / kills
        while sum(len(rater.acknowledged) for rater in raters) < due - draw.random() * 10:
            assert not any(rater.strange for rater in raters), [rater.strange for rater in raters]
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        server.kill()
        if kill % 10 == 1:  # an export in between
            with closing(Store.open(str(store))) as reader:
                assert len(reader.judgements()) >= due - 10 - num_raters
        server = Process.start(store, port, *flags)
    for rater in raters:
        rater.join(120)
    server.kill()
    assert not any(rater.strange for rater in raters), [rater.strange for rater in raters]
    return [said for rater in raters for said in rater.acknowledged], store


@pytest.mark.parametrize(
    ("num_raters", "each", "kills"),
    [
        pytest.param(3, 15, 3, id="3 raters, 45 rankings, 3 kills", marks=pytest.mark.slow),
        pytest.param(8, 200, 50, id="8 raters, 1600 rankings, 50 kills", marks=pytest.mark.exhaustive),
    ],
)
def test_f22_no_acknowledged_ranking_is_lost_or_counted_twice(
    tmp_path: Path, num_raters: int, each: int, kills: int
) -> None:
    acknowledged, path = ranked_under_kills(tmp_path, num_raters, each, kills)
    assert len(acknowledged) == len(set(acknowledged)) == num_raters * each
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        rows = db.execute(
            "SELECT j.rater, deal, ranks, shown, j.item FROM judgements j JOIN deals ON deals.id = deal"
            " WHERE withdrawn_at IS NULL"
        ).fetchall()
    found = Counter((rater, deal, in_shown_order(ranks, shown)) for rater, deal, ranks, shown, _ in rows)
    assert [said for said in acknowledged if found[said] != 1] == []
    assert len(rows) == num_raters * each  # and nothing that nobody said
    assert len({(rater, item) for rater, *_, item in rows}) == len(rows)


def in_shown_order(ranks: str | None, shown: str) -> tuple[int | None, ...] | None:
    return None if ranks is None else tuple(json.loads(ranks)[i] for i in json.loads(shown))


# ---- the file, the disk, other programs ------------------------------------------------------------------------------


def refused_as_unavailable(anna: Visitor, page: Loaded, reason: str) -> None:
    """Both pages answer 503 with this reason and when to come back."""
    said = anna.say(page, [1, 2, 3])
    assert said.status_code == 503, said.text
    assert said.json() == {"error": f"The store cannot be used at present: {reason}."}
    shown = anna.client.get(f"{anna.address}/rank")
    assert (shown.status_code, reason in shown.text) == (503, True)
    assert said.headers["retry-after"] == shown.headers["retry-after"] == "5"
    assert "Traceback" not in said.text + shown.text


def begun(folder: Path) -> tuple[Study, Visitor, Loaded]:
    """A study, and a rater before an item."""
    there = study(folder)
    anna = there.visitor("anna")
    page = anna.load()
    assert page is not None
    return there, anna, page


def test_f22_locked_by_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.ranking.database.BUSY_SECONDS", 0.3)
    there, anna, page = begun(tmp_path)
    with closing(sqlite3.connect(there.settings.store, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        refused_as_unavailable(anna, page, "another program has kept it locked for 0.3 s")
        other.execute("ROLLBACK")
    assert anna.say(page, [1, 2, 3]).status_code == 200
    assert there.store.num_judgements() == 1


@pytest.mark.slow
def test_f22_a_lock_of_three_seconds_is_waited_for_one_of_longer_is_said(tmp_path: Path) -> None:
    there, anna, page = begun(tmp_path)
    with closing(sqlite3.connect(there.settings.store, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        answer = anna.say(page, [1, 2, 3])
        assert (answer.status_code, 5 <= time.monotonic() - began < 7) == (503, True)
        threading.Timer(3, other.execute, ["ROLLBACK"]).start()
        assert anna.say(page, [1, 2, 3]).status_code == 200


def test_f22_the_disk_is_full(tmp_path: Path) -> None:
    there, anna, page = begun(tmp_path)
    connection = there.store.database.connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be out of space
    long = {"comment": "x" * 4000}
    while (answer := anna.say(page, [1, 2, 3], **long)).status_code == 200:
        page = anna.load() or page
    assert answer.json() == {"error": "The store cannot be used at present: the disk is full."}
    connection.execute("PRAGMA max_page_count = 1000000")
    assert anna.say(page, [1, 2, 3], **long).status_code == 200


FILL = """
import os, resource, signal, sys
from keel.data.items import UnrankedResponses
from keel.ranking.database import StoreError
from keel.ranking.store import Store
store = Store.open(sys.argv[1])
store.add_items(UnrankedResponses(f"question {i}", ("a", "b")) for i in range(2000))
store.add_raters(["anna"])
if len(sys.argv) > 2:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = os.path.getsize(sys.argv[1] + "-wal") + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
while True:
    try:
        deal = store.deal("anna")
        store.record_judgement("anna", deal.id, [1, 2], "x" * 1000)
    except StoreError as error:
        print(f"keel: {error}", flush=True)
        break
    print(deal.id, flush=True)
os._exit(0)  # as if killed
"""


def filled(folder: Path, *command: str) -> tuple[list[str], str, set[str]]:
    """What a process acknowledged before its disk was full, its last word, and what is found afterwards."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    *acknowledged, last = done.stdout.splitlines()
    with closing(sqlite3.connect(folder / "ratings.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return acknowledged, last, {deal for (deal,) in db.execute("SELECT deal FROM judgements")}


def test_f22_a_limit_of_the_system(tmp_path: Path) -> None:
    path = tmp_path / "ratings.db"
    acknowledged, last, found = filled(tmp_path, sys.executable, "-c", FILL, str(path), "1000000")
    assert last == f"keel: {path}: disk I/O error -> repair the storage, then start again"
    assert len(acknowledged) > 10
    assert set(acknowledged) <= found


def test_f22_a_small_disk(tmp_path: Path) -> None:
    """A file system of two megabytes, mounted for this process alone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = f"mount -t tmpfs -o size=2m none {disk} && {sys.executable} -c '{FILL}' {disk}/ratings.db"
    script = f"{inside} && cp {disk}/ratings.db* {tmp_path}"
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)], check=False).returncode:
        pytest.skip("may not mount")
    acknowledged, last, found = filled(tmp_path, "unshare", "-rm", "sh", "-c", script)
    assert last == f"keel: {disk}/ratings.db: the disk is full -> free some space"
    assert len(acknowledged) > 10
    assert set(acknowledged) <= found


@pytest.mark.parametrize("name", ["ratings.db", "ratings.db-wal"])
@pytest.mark.parametrize("fate", ["deleted", "replaced"])
def test_f22_a_file_that_went_away(tmp_path: Path, name: str, fate: str) -> None:
    _, anna, page = begun(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    if fate == "replaced":
        (tmp_path / name).write_bytes((tmp_path / "elsewhere").read_bytes())
    refused_as_unavailable(anna, page, "the file was deleted or replaced")
    assert anna.say(page, [1, 2, 3]).status_code == 503  # and so is the next attempt


def test_f22_put_back_in_time_it_goes_on(tmp_path: Path) -> None:
    there, anna, page = begun(tmp_path)
    (tmp_path / "ratings.db").rename(tmp_path / "elsewhere")
    assert anna.say(page, [1, 2, 3]).status_code == 503
    (tmp_path / "elsewhere").rename(tmp_path / "ratings.db")
    assert anna.say(page, [1, 2, 3]).status_code == 200
    assert there.store.num_judgements() == 1


def sqlite(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (lambda path: path.write_text("prompt,answer\n" * 100), "not a database -> choose another store"),
    "a few bytes": (lambda path: path.write_bytes(b"x"), "not a database -> choose another store"),
    "zeros": (lambda path: path.write_bytes(bytes(8192)), "not a database -> choose another store"),
    "somebody's tables": (
        lambda path: sqlite(path, "CREATE TABLE mine (x)"),
        "a database of another program -> choose another store",
    ),
    "somebody's empty one": (
        lambda path: sqlite(path, "PRAGMA application_id = 7"),
        "a database of another program -> choose another store",
    ),
    "a newer schema": (
        lambda path: sqlite(path, f"PRAGMA application_id = {0x6B65656C}", "PRAGMA user_version = 99"),
        "a store of schema 99; this keel knows 2 -> update keel",
    ),
    "a folder": (lambda path: path.mkdir(), "cannot open it: Is a directory -> choose another store"),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("flags", [[], ["--stats"], ["--export", "out.jsonl"]], ids=["rank", "stats", "export"])
def test_f22_what_is_no_store_is_refused_and_left_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    flags: list[str],
) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it serves"))
    path = tmp_path / "ratings.db"
    spoil, expected = SPOILT[name]
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    code = main(["rank", *flags, "--store", str(path)])
    assert capsys.readouterr().err == f"keel: error: {path}: {expected}\n"
    assert code == 2
    assert (path.read_bytes() if path.is_file() else None) == before
    assert [each.name for each in tmp_path.iterdir()] == ["ratings.db"]


def test_f22_a_damaged_store_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "ratings.db"
    with closing(Store.open(str(path))) as store:
        store.add_items(UnrankedResponses(f"question {i}", ("a" * 100, "b" * 100)) for i in range(500))
    data = bytearray(path.read_bytes())
    for place in range(3 * 4096, len(data), 4096):
        data[place : place + 64] = bytes(range(64))
    path.write_bytes(data)
    with pytest.raises((DataError, StoreError), match="damaged"):
        Store.open(str(path))


def test_f22_a_kill_while_it_is_made_leaves_what_can_be_begun_again(tmp_path: Path) -> None:
    (tmp_path / "ratings.db").touch()
    with closing(Store.open(str(tmp_path / "ratings.db"))) as store:
        assert store.add_items([UnrankedResponses("p", ("a", "b"))]) == 1


def test_f22_many_begin_and_fill_one_store_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time; from keel.ranking.store import Store; from keel.data.items import UnrankedResponses\n"
        "time.sleep(max(0.0, float(sys.argv[2]) - time.time()))\n"
        "store = Store.open(sys.argv[1]); store.add_raters(['anna'])\n"
        "store.add_items(UnrankedResponses(f'question {i}', ('a', 'b')) for i in range(50))\n"
        "print(store.tokens()['anna'])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "ratings.db"), str(time.time() + 2)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = {child.communicate(timeout=60)[0] for child in children}
    assert [child.returncode for child in children] == [0] * 6
    assert len(said) == 1
    with closing(Store.open(str(tmp_path / "ratings.db"))) as store:
        assert len(store.items()) == 50


# ---- what is posted --------------------------------------------------------------------------------------------------

BODIES: dict[str, tuple[dict[str, Any], int]] = {
    "a ranking": ({"ranks": [1, 2, 3]}, 200),
    "ties": ({"ranks": [1, 1, 2]}, 200),
    "all tied": ({"ranks": [1, 1, 1]}, 200),
    "gaps": ({"ranks": [2, 40, 600]}, 200),
    "one left out": ({"ranks": [None, 2, 1]}, 200),
    "cannot judge": ({"ranks": None}, 200),
    "nothing ranked is cannot judge": ({"ranks": [None, None, None]}, 200),
    "a comment and tags": ({"ranks": [1, 2, 3], "comment": "why\n\x00 \U0001f600", "tags": ["off topic", "rude"]}, 200),
    "a tag twice": ({"ranks": [1, 2, 3], "tags": ["rude", "rude"]}, 200),
    "a clock that runs back": ({"ranks": [1, 2, 3], "seconds": -3600}, 200),
    "a clock that leaps": ({"ranks": [1, 2, 3], "seconds": 1e300}, 200),
    "only one ranked": ({"ranks": [1, None, None]}, 422),
    "too few": ({"ranks": [1, 2]}, 422),
    "too many": ({"ranks": [1, 2, 3, 4]}, 422),
    "none": ({"ranks": []}, 422),
    "rank zero": ({"ranks": [0, 1, 2]}, 422),
    "below zero": ({"ranks": [-1, 1, 2]}, 422),
    "an unknown tag": ({"ranks": [1, 2, 3], "tags": ["mine"]}, 422),
    "a hundred": ({"ranks": [1] * 100}, 400),
    "fractions": ({"ranks": [1.5, 1, 2]}, 400),
    "whole fractions": ({"ranks": [1.0, 2, 3]}, 400),
    "true": ({"ranks": [True, 2, 3]}, 400),
    "texts": ({"ranks": ["1", "2", "3"]}, 400),
    "a text": ({"ranks": "123"}, 400),
    "an object": ({"ranks": {"0": 1, "1": 2, "2": 3}}, 400),
    "lists": ({"ranks": [[1], [2], [3]]}, 400),
    "no ranks": ({}, 400),
    "a comment that is none": ({"ranks": [1, 2, 3], "comment": None}, 400),
    "a long comment": ({"ranks": [1, 2, 3], "comment": "x" * 4001}, 400),
    "tags that are none": ({"ranks": [1, 2, 3], "tags": "rude"}, 400),
    "time that is none": ({"ranks": [1, 2, 3], "seconds": "5"}, 400),
    "another rater": ({"ranks": [1, 2, 3], "rater": "ben"}, 400),
    "another item": ({"ranks": [1, 2, 3], "item": 3}, 400),
    "a deal that is none": ({"ranks": [1, 2, 3], "deal": 7}, 400),
    "an unknown deal": ({"ranks": [1, 2, 3], "deal": "AAAAAAAAAAAAAAAAAAAAAAAA"}, 404),
    "an empty deal": ({"ranks": [1, 2, 3], "deal": ""}, 404),
}


@pytest.mark.parametrize("name", BODIES)
def test_f23_each_content_is_kept_or_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    there = study(tmp_path, tags=["rude", "off topic"])
    anna = there.visitor("anna")
    page = anna.load()
    assert page is not None
    body, status = BODIES[name]
    answer = anna.post("/judgements", {"deal": page.deal, **body}, page.csrf)
    assert (answer.status_code, list(answer.json())) == (status, ["next"] if status == 200 else ["error"]), answer.text
    assert there.store.num_judgements() == (status == 200)
    after = anna.load()
    assert after is not None
    assert (after.deal == page.deal) == (status != 200)  # the page stays where it was
    if status == 200:
        assert there.store.judgements()[0].seconds < 5
        assert anna.post("/judgements", {"deal": page.deal, **body}, page.csrf).status_code == 200
        assert there.store.num_judgements() == 1


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"7", b"{", b"\xff\xfe", b'{"deal": NaN}', b"[" * 60_000,
                                  b'{"deal": "\\ud800"}', b'{"ranks": [' + b"9" * 5000 + b"]}"])  # fmt: skip
def test_f23_bodies_that_say_nothing(tmp_path: Path, body: bytes) -> None:
    anna = study(tmp_path).visitor("anna")
    page = anna.load()
    assert page is not None
    headers = {"Origin": anna.address, "X-Keel-Token": page.csrf, "Content-Type": "application/json"}
    for path in ("/judgements", "/undo") if body in (b"", b"{", b"\xff\xfe") else ("/judgements",):
        answer = anna.client.post(anna.address + path, content=body, headers=headers)
        assert (answer.status_code, list(answer.json())) == (400, ["error"])


def test_f23_a_page_that_is_no_longer_true(tmp_path: Path) -> None:
    there, anna, page = begun(tmp_path)
    other_tab = anna.load()
    assert other_tab == page
    assert anna.say(page, [1, 2, 3]).status_code == 200
    stale = anna.say(page, [3, 2, 1])
    assert (stale.status_code, "ranked already" in stale.json()["error"]) == (409, True)
    second = anna.load()
    assert second is not None
    assert anna.undo(second).status_code == 200
    for old in (page, second):
        assert anna.say(old, [1, 2, 3]).status_code == 409
    again = anna.load()
    assert again is not None
    assert again.answers == page.answers
    assert again.previous == {"ranks": [1, 2, 3], "comment": "", "tags": []}
    assert anna.say(again, [3, 2, 1]).status_code == 200
    assert [judgement.ranks is not None for judgement in there.store.judgements()] == [True]
    assert anna.undo(again).status_code == 200
    answer = anna.undo(again)
    assert (answer.status_code, answer.json()) == (409, {"error": "There is nothing to undo."})


def test_f23_submitted_twice_at_the_same_time(tmp_path: Path) -> None:
    with serving(tmp_path) as there, httpx.Client() as client:
        anna = Visitor(client, private_links(there.store, there.settings)["anna"])
        anna.enter()
        page = anna.load()
        assert page is not None
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(anna.say(page, [1, 2, 3]).status_code)) for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [200] * 12
        assert there.store.num_judgements() == 1
