"""What is left to rank, kept in memory, against the store asked in SQL each time."""

import random
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median

import pytest

from keel.data.items import UnrankedResponses
from keel.ranking.deals import Conflict, Progress
from keel.ranking.store import HELD_SECONDS, Store

RATERS = ["anna", "ben", "cleo"]
STANDING = "(SELECT COUNT(*) FROM judgements WHERE item = items.number AND withdrawn_at IS NULL)"
NOT_JUDGED = "number NOT IN (SELECT item FROM judgements WHERE rater = :rater AND withdrawn_at IS NULL)"
NEXT = f"""
SELECT number FROM (
    SELECT number, {STANDING} AS judged,
        (SELECT COUNT(*) FROM deals WHERE item = items.number AND open = 1 AND dealt_at > :since) AS held
    FROM items WHERE {NOT_JUDGED}
) WHERE judged < :overlap ORDER BY judged + held >= :overlap, judged + held, number LIMIT 1
"""
LEFT = f"""
SELECT COUNT(*) FROM items WHERE {NOT_JUDGED} AND
    ({STANDING} < :overlap OR number IN (SELECT item FROM deals WHERE rater = :rater AND open = 1))
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.open(str(tmp_path / "ratings.db"), overlap=2)) as store:
        store.add_items(UnrankedResponses(f"question {i}", ("a", "b")) for i in range(12))
        store.add_raters(RATERS)
        yield store


def expected_next(store: Store, rater: str) -> int | None:
    db = store.database.connection
    found = db.execute("SELECT item FROM deals WHERE rater = ? AND open = 1", (rater,)).fetchone()
    if found is None:
        asked = {"rater": rater, "overlap": store.overlap, "since": time.time() - HELD_SECONDS}
        found = db.execute(NEXT, asked).fetchone()
    return found and found[0]


def expected_progress(store: Store, rater: str) -> Progress:
    db = store.database.connection
    every = db.execute("SELECT rater, seconds FROM judgements WHERE withdrawn_at IS NULL").fetchall()
    own = [seconds for name, seconds in every if name == rater]
    times = own or [seconds for _, seconds in every]
    (left,) = db.execute(LEFT, {"rater": rater, "overlap": store.overlap}).fetchone()
    return Progress(len(own), left, left * median(times) if times else None)


def step(store: Store, draw: random.Random, rater: str) -> None:
    """Look, rank, take back, or leave an item lying."""
    item = expected_next(store, rater)
    deal = store.deal(rater)
    assert (deal and deal.item.number) == item
    what = draw.random()
    if what < 0.55 and deal is not None:
        store.record_judgement(rater, deal.id, draw.choice([[1, 2], [1, 1], None]), seconds=draw.choice([0.0, 1.0]))
    elif what < 0.7:
        try:
            store.undo(rater)
        except Conflict:
            assert expected_progress(store, rater).done == 0


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_the_store_says(store: Store, seed: int):
    draw = random.Random(seed)
    for number in range(120):
        step(store, draw, draw.choice(RATERS))
        for rater in RATERS:
            assert store.progress(rater) == expected_progress(store, rater)
        if number == 60:
            store.add_items([UnrankedResponses("another question", ("a", "b"))])
            store.add_raters(["dora"])


def test_another_program_may_rank_in_the_same_store(store: Store):
    assert store.progress("anna").left == 12
    with closing(Store.open(str(store.database.path))) as other:
        other.add_items([UnrankedResponses("another question", ("a", "b"))])
        for _ in range(3):
            deal = other.deal("ben")
            assert deal is not None
            other.record_judgement("ben", deal.id, [1, 2])
        assert store.progress("anna") == expected_progress(store, "anna")
        step(store, random.Random(0), "anna")
        assert other.progress("ben") == expected_progress(store, "ben")


def test_what_is_rolled_back_was_not_ranked(store: Store):
    deal = store.deal("anna")
    assert deal is not None

    def half_done() -> None:
        with store.together():
            store.record_judgement("anna", deal.id, [1, 2])
            assert store.progress("anna").done == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_done()
    assert store.progress("anna") == expected_progress(store, "anna") == Progress(0, 12, None)


def test_a_judgement_that_cannot_be_committed_was_not_ranked(store: Store, monkeypatch: pytest.MonkeyPatch):
    deal = store.deal("anna")
    assert deal is not None
    with monkeypatch.context() as patched:
        patched.setattr("keel.ranking.database.note_change", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.record_judgement("anna", deal.id, [1, 2])
    assert store.progress("anna") == expected_progress(store, "anna") == Progress(0, 12, None)
    store.record_judgement("anna", deal.id, [1, 2])
    assert store.progress("anna") == expected_progress(store, "anna")


def test_a_page_asks_the_store_for_as_little_with_many_items_as_with_few(tmp_path: Path):
    """In operations of SQLite's machine, which no load of this machine changes."""
    counts = []
    for items in (100, 5000):
        with closing(Store.open(str(tmp_path / f"{items}.db"), overlap=2)) as store:
            store.add_items(UnrankedResponses(f"question {i}", ("a", "b")) for i in range(items))
            store.add_raters(RATERS)
            store.progress("anna")
            steps: list[int] = []
            store.database.connection.set_progress_handler(lambda steps=steps: steps.append(1), 10)
            for _ in range(5):
                deal = store.deal("anna")
                assert deal is not None
                store.progress("anna")
                store.record_judgement("anna", deal.id, [1, 2])
            counts.append(len(steps))
    assert counts[1] <= counts[0] * 1.2 + 5
