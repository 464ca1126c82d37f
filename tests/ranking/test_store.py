"""The store of rankings: what is dealt to whom, what a ranking becomes, and that it stays."""

import json
import random
import sqlite3
import stat
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from keel.data.items import UnrankedResponses, in_pairs, read_unranked_responses
from keel.errors import DataError
from keel.ranking.deals import Conflict, Deal, NotDealt
from keel.ranking.judgements import Item
from keel.ranking.store import HELD_SECONDS, Store

ROWS = [UnrankedResponses(f"question {i}", tuple(f"{i}{letter}" for letter in "abcd"), "a model") for i in range(1, 4)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "ratings.db")


class Clock:
    """Time stands still unless told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("keel.ranking.store.time", clock)
    return clock


def begun(path: str, *raters: str, rows: list[UnrankedResponses] = ROWS, overlap: int = 1) -> Store:
    store = Store.open(path, overlap)
    store.add_items(rows)
    store.add_raters(raters)
    return store


def next_deal(store: Store, rater: str) -> Deal:
    deal = store.deal(rater)
    assert deal is not None
    return deal


def rank_one(store: Store, rater: str) -> int:
    """Judge whatever comes next; its item."""
    deal = next_deal(store, rater)
    store.record_judgement(rater, deal.id, [1, 2, 3, 4][: len(deal.shown)])
    return deal.item.number


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_new_store_is_private_and_durable(path: str):
    store = Store.open(path)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(f"{path}-wal").stat().st_mode) == 0o600
    asked = ("journal_mode", "synchronous", "foreign_keys", "application_id", "user_version")
    connection = store.database.connection
    found = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in asked}
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "foreign_keys": 1,
        "application_id": int.from_bytes(b"keel", "big"),
        "user_version": 2,
    }


def test_it_goes_on_where_it_was(path: str):
    store = begun(path, "anna", "ben")
    rank_one(store, "anna")
    open_deal, tokens, owner = store.deal("anna"), store.tokens(), store.owner_token()
    judgements = store.judgements()
    store.close()
    again = begun(path, "ben", "cleo")
    assert again.deal("anna") == open_deal
    assert (again.judgements(), again.owner_token()) == (judgements, owner)
    assert {name: again.tokens()[name] for name in tokens} == tokens
    assert again.raters() == ["anna", "ben", "cleo"]
    assert len(set(again.tokens().values()) | {owner}) == 4
    assert all(len(token) == 32 for token in again.tokens().values())  # 24 random bytes


@pytest.mark.parametrize("name", ["", " anna", "anna ", "a\nb", "a\x00b", "a\u202eb", "\ud800", "a" * 65])
def test_what_is_no_name(path: str, name: str):
    store = Store.open(path)
    with pytest.raises(DataError, match="is not a name of 1 to 64 printable characters"):
        store.add_raters(["anna", name])
    assert store.raters() == []
    store.add_raters(["a" * 64, "Ana Gómez", "王", "O'Brien; DROP TABLE raters --"])
    assert len(store.raters()) == 4


# ---- items -----------------------------------------------------------------------------------------------------------


def test_items_are_what_the_file_says_and_each_is_there_once(tmp_path: Path, path: str):
    chat = [{"role": "user", "content": "hi"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "other": 1},
        {"prompt": chat, "responses": ["a", "", "ü \u0000"], "source": "model 1"},
        {"prompt": "p", "responses": ["a", "b"], "source": "the same row"},
        {"prompt": "p", "responses": ["b", "a"]},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store.open(path)
    assert store.add_items(read_unranked_responses(str(file))) == 3
    assert store.add_items(read_unranked_responses(str(file))) == 0
    assert store.items() == [
        Item(1, "p", ("a", "b"), ""),
        Item(2, chat, ("a", "", "ü \u0000"), "model 1"),
        Item(3, "p", ("b", "a"), ""),
    ]


BAD_ROWS = {
    '{"responses": ["a", "b"]}': 'no column "prompt"; columns: responses',
    '{"prompt": " ", "responses": ["a", "b"]}': '"prompt" is empty',
    '{"prompt": "p", "response": ["a", "b"]}': "no column \"responses\"; did you mean 'response'?",
    '{"prompt": "p", "responses": "ab"}': 'expected a list in "responses", got text',
    '{"prompt": "p", "responses": ["a"]}': '1 in "responses"; give 2 to 9',
    '{"prompt": "p", "responses": ["a","b","c","d","e","f","g","h","i","j"]}': '10 in "responses"; give 2 to 9',
    '{"prompt": "p", "responses": ["a", null]}': '"responses" has an entry that is not text',
    '{"prompt": [{"role": "user"}], "responses": ["a", "b"]}': '"prompt": message 1 (user) has no "content"',
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, row: str):
    file = tmp_path / "answers.jsonl"
    file.write_text(f'{{"prompt": "p", "responses": ["a", "b"]}}\n\n{row}\n')
    with pytest.raises(DataError) as error:
        read_unranked_responses(str(file))
    assert f"{file}:3: {BAD_ROWS[row]}" in str(error.value)


@pytest.mark.parametrize(("num_answers", "num_pairs"), [(2, 1), (3, 2), (4, 2), (5, 3), (9, 5)])
def test_rows_cut_into_pairs_keep_every_answer(num_answers: int, num_pairs: int):
    answers = tuple("abcdefghi"[:num_answers])
    pairs = list(in_pairs([UnrankedResponses("p", answers, "s")], seed=0))
    assert [len(pair.responses) for pair in pairs] == [2] * num_pairs
    assert {(pair.prompt, pair.source) for pair in pairs} == {("p", "s")}
    uses = Counter(response for pair in pairs for response in pair.responses)
    assert sorted(uses) == list(answers)
    assert sorted(uses.values()) == [1] * (num_answers - num_answers % 2) + [2] * (num_answers % 2)
    assert all(pair.responses[0] != pair.responses[1] for pair in pairs)
    assert pairs == list(in_pairs([UnrankedResponses("p", answers, "s")], seed=0))
    assert num_answers < 4 or any(
        pairs != list(in_pairs([UnrankedResponses("p", answers, "s")], seed)) for seed in range(1, 9)
    )


def test_a_row_of_two_is_a_pair_as_it_is():
    assert list(in_pairs([UnrankedResponses("p", ("b", "a"))], seed=3)) == [UnrankedResponses("p", ("b", "a"))]


# ---- dealing ---------------------------------------------------------------------------------------------------------


def test_an_item_stays_until_it_is_judged(path: str):
    store = begun(path, "anna")
    first = next_deal(store, "anna")
    assert store.deal("anna") == first
    store.record_judgement("anna", first.id, [1, 2, 3, 4])
    assert [rank_one(store, "anna"), rank_one(store, "anna")] == [2, 3]
    assert store.deal("anna") is None


def test_each_rater_sees_an_order_of_their_own(path: str):
    rows = [UnrankedResponses(f"question {i}", tuple("abcd")) for i in range(60)]
    store = begun(path, "anna", "ben", rows=rows, overlap=2)
    orders: dict[str, list[tuple[int, ...]]] = {"anna": [], "ben": []}
    for rater, seen in orders.items():
        while (deal := store.deal(rater)) is not None:
            seen.append(deal.shown)
            store.record_judgement(rater, deal.id, None)
    assert orders["anna"] != orders["ben"]
    firsts = Counter(shown[0] for seen in orders.values() for shown in seen)
    assert sorted(firsts) == [0, 1, 2, 3]
    assert min(firsts.values()) >= 15  # of 120, each first a quarter of the time: 30 +- 4.7
    assert all(sorted(shown) == [0, 1, 2, 3] for seen in orders.values() for shown in seen)


def test_raters_share_the_items_and_what_is_wanted_twice_comes_twice(path: str):
    store = begun(path, "anna", "ben", overlap=1)
    assert next_deal(store, "anna").item.number == 1
    assert [rank_one(store, "ben"), rank_one(store, "ben")] == [2, 3]
    store.close()
    twice = begun(path, "anna", "ben", overlap=2)
    assert [rank_one(twice, "ben")] == [1]  # the item that anna looks at goes to ben as well
    assert twice.deal("ben") is None
    assert [rank_one(twice, "anna") for _ in range(3)] == [1, 2, 3]
    assert twice.deal("anna") is None


def test_nobody_waits_for_another(path: str, clock: Clock):
    store = begun(path, "anna", "ben", rows=ROWS[:1])
    held = next_deal(store, "anna")
    assert rank_one(store, "ben") == 1
    store.record_judgement("anna", held.id, [1, 2, 3, 4])  # not in vain: it counts too
    assert [judgement.rater for judgement in store.judgements()] == ["ben", "anna"]


def test_an_item_left_lying_comes_back(path: str, clock: Clock):
    store = begun(path, "anna", "ben", rows=ROWS[:2])
    assert next_deal(store, "anna").item.number == 1
    assert next_deal(store, "ben").item.number == 2
    clock.now += HELD_SECONDS + 1
    store.add_raters(["cleo"])
    assert rank_one(store, "ben") == 2
    assert rank_one(store, "cleo") == 1
    assert next_deal(store, "anna").item.number == 1  # and still lies before anna


@pytest.mark.parametrize("seed", range(4))
def test_whatever_raters_do_all_is_judged_as_often_as_wanted(path: str, clock: Clock, seed: int):
    draw, names, overlap = random.Random(seed), ["a", "b", "c", "d", "e"], 1 + seed % 3
    rows = [UnrankedResponses(f"question {i}", ("x", "y")) for i in range(12)]
    store = begun(path, *names, rows=rows, overlap=overlap)
    idle: set[str] = set()
    for _ in range(2000):
        rater = draw.choice(names)
        clock.now += draw.choice([1, 10, 300])
        deal = store.deal(rater)
        action = draw.random()
        if deal is None:
            idle.add(rater)
            if len(idle) == len(names):
                break
        elif action < 0.6:
            store.record_judgement(rater, deal.id, draw.choice([[1, 2], [2, 1], [1, 1], None]))
        elif action < 0.7 and store.progress(rater).done:
            store.undo(rater)
            idle.clear()
    counts = Counter(judgement.item.number for judgement in store.judgements())
    assert sorted(counts) == list(range(1, 13))
    assert min(counts.values()) >= overlap
    pairs = Counter((judgement.item.number, judgement.rater) for judgement in store.judgements())
    assert set(pairs.values()) == {1}
    assert all(store.progress(name).left == 0 for name in names)


# ---- judging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([4, 4, 9, 1], [2, 2, 3, 1]),
        ([None, 7, None, 7], [None, 1, None, 1]),
        ([10**30, 1, 1, 1], [2, 1, 1, 1]),
        ([None] * 4, None),
        (None, None),
    ],
)
def test_ranks_are_kept_by_response_and_without_gaps(path: str, given: Any, kept: Any):
    store = begun(path, "anna", rows=ROWS[:1])
    deal = next_deal(store, "anna")
    store.record_judgement("anna", deal.id, given, "why", ["b", "a", "b"], 2.0)
    (judgement,) = store.judgements()
    assert judgement.item == Item(1, "question 1", ("1a", "1b", "1c", "1d"), "a model")
    in_shown_order = judgement.ranks and [judgement.ranks[i] for i in judgement.shown]
    assert in_shown_order == kept
    assert judgement.shown == deal.shown
    assert (judgement.rater, judgement.comment, judgement.tags) == ("anna", "why", ("b", "a"))


def test_an_example_by_hand(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("keel.ranking.store.response_order", lambda *_: [2, 0, 3, 1])
    store = begun(path, "anna", rows=ROWS[:1])
    store.record_judgement("anna", next_deal(store, "anna").id, [3, 1, None, 1])  # shown: c a d b
    assert store.judgements()[0].ranks == (1, 1, 2, None)  # of a b c d


@pytest.mark.parametrize(
    "ranks",
    [[], [1, 2, 3], [1, 2, 3, 4, 5], [1, None, None, None], [0, 1, 2, 3], [-1, 1, 2, 3], [1.0, 2, 3, 4],
     [True, 2, 3, 4], ["1", "2", "3", "4"], [[1], 2, 3, 4], [float("nan"), 1, 2, 3]],
)  # fmt: skip
def test_what_ranks_nothing_is_refused(path: str, ranks: Any):
    store = begun(path, "anna")
    deal = next_deal(store, "anna")
    with pytest.raises(DataError):
        store.record_judgement("anna", deal.id, ranks)
    assert store.num_judgements() == 0
    assert store.deal("anna") == deal


def test_said_again_it_counts_once_said_otherwise_it_is_refused(path: str):
    store = begun(path, "anna")
    deal = next_deal(store, "anna")
    store.record_judgement("anna", deal.id, [1, 2, 3, 4], "x", ["t"], 1.0)
    store.record_judgement("anna", deal.id, [10, 20, 30, 40], "x", ["t"], 2.0)  # the same, with other numbers for it
    for other in ([2, 1, 3, 4], None):
        with pytest.raises(Conflict):
            store.record_judgement("anna", deal.id, other, "x", ["t"])
    with pytest.raises(Conflict):
        store.record_judgement("anna", deal.id, [1, 2, 3, 4], "y", ["t"])
    assert store.num_judgements() == 1


def test_only_who_was_dealt_an_item_may_judge_it(path: str):
    store = begun(path, "anna", "ben")
    deal = next_deal(store, "anna")
    for rater, name in (("ben", deal.id), ("anna", "nothing"), ("anna", ""), ("nobody", deal.id)):
        with pytest.raises(NotDealt):
            store.record_judgement(rater, name, [1, 2, 3, 4])
    assert store.num_judgements() == 0


def test_the_clock_of_this_machine_has_the_last_word(path: str, clock: Clock):
    store = begun(path, "anna", rows=[UnrankedResponses(f"question {i}", ("a", "b")) for i in range(5)])
    for step, said in ((10.0, 3.0), (10.0, 99.0), (10.0, float("inf")), (10.0, -5.0), (-3600.0, 5.0)):
        deal = next_deal(store, "anna")
        clock.now += step
        store.record_judgement("anna", deal.id, [1, 2], seconds=said)
    assert [judgement.seconds for judgement in store.judgements()] == [3.0, 10.0, 10.0, 0.0, 0.0]
    assert store.judgements()[0].made == "1970-01-12T13:46:50+00:00"


# ---- undo and progress -----------------------------------------------------------------------------------------------


def test_undo_deals_the_item_again_with_what_was_said(path: str):
    store = begun(path, "anna", "ben")
    first = next_deal(store, "anna")
    store.record_judgement("anna", first.id, [2, 1, None, 3], "hm", ["t"], 0.0)
    second = next_deal(store, "anna")
    (said,) = store.judgements()
    again = store.undo("anna")
    assert (again.item, again.shown, again.previous) == (first.item, first.shown, said)
    assert again.id not in (first.id, second.id)
    assert store.deal("anna") == again
    assert store.judgements() == []
    for over in (first, second):  # pages that are still open somewhere
        with pytest.raises(Conflict):
            store.record_judgement("anna", over.id, [2, 1, None, 3], "hm", ["t"])
    store.record_judgement("anna", again.id, None)
    assert next_deal(store, "anna").item == second.item
    (kept,) = store.judgements()
    assert (kept.ranks, kept.item) == (None, first.item)
    rows = store.database.connection.execute("SELECT ranks, withdrawn_at IS NULL FROM judgements").fetchall()
    assert [row[1] for row in rows] == [0, 1]  # history stays


def test_undo_goes_back_as_far_as_there_is_something(path: str):
    store = begun(path, "anna", "ben")
    rank_one(store, "ben")
    assert [rank_one(store, "anna"), rank_one(store, "anna")] == [2, 3]
    assert [store.undo("anna").item.number, store.undo("anna").item.number] == [3, 2]
    with pytest.raises(Conflict, match="nothing to undo"):
        store.undo("anna")
    assert [judgement.rater for judgement in store.judgements()] == ["ben"]
    rank_one(store, "anna")
    deal = next_deal(store, "anna")
    assert deal.item.number == 3
    assert deal.previous is not None  # it was judged once


def test_progress_by_hand(path: str, clock: Clock):
    store = begun(path, "anna", "ben", "cleo", overlap=2)
    assert store.progress("anna").__dict__ == {"done": 0, "left": 3, "seconds_left": None}
    for seconds in (2.0, 4.0, 30.0):
        deal = next_deal(store, "anna")
        clock.now += 100
        store.record_judgement("anna", deal.id, None, seconds=seconds)
    assert store.progress("anna").__dict__ == {"done": 3, "left": 0, "seconds_left": 0.0}
    assert store.progress("ben").__dict__ == {"done": 0, "left": 3, "seconds_left": 12.0}  # at anna's median
    deal = next_deal(store, "ben")
    clock.now += 100
    store.record_judgement("ben", deal.id, None, seconds=10.0)
    assert store.progress("ben").__dict__ == {"done": 1, "left": 2, "seconds_left": 20.0}
    assert store.progress("cleo").left == 2
    store.undo("ben")
    assert store.progress("ben").__dict__ == {"done": 0, "left": 3, "seconds_left": 12.0}


def test_the_database_itself_refuses_a_second_word(path: str):
    store = begun(path, "anna")
    rank_one(store, "anna")
    with pytest.raises(sqlite3.IntegrityError, match=r"judgements\.item, judgements\.rater"):
        store.database.connection.execute(
            "INSERT INTO judgements SELECT 2, deal, item, rater, ranks, comment, tags, seconds, made_at, NULL"
            " FROM judgements"
        )
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        store.database.connection.execute("INSERT INTO deals VALUES ('x', 99, 'anna', '[]', 0, 0)")


def test_the_overlap_is_remembered_until_another_is_given(path: str) -> None:
    begun(path, "anna", overlap=3).close()
    with closing(Store.open(path)) as again:
        assert again.overlap == 3
    with closing(Store.open(path, overlap=2)) as changed:
        assert changed.overlap == 2
    with closing(Store.open(path)) as again:
        assert again.overlap == 2


def test_what_is_done_together_counts_together_or_not_at_all(path: str) -> None:
    store = begun(path, "anna")
    with store.together():
        for _ in range(2):
            deal = store.deal("anna")
            assert deal is not None
            store.record_judgement("anna", deal.id, list(range(1, 1 + len(deal.shown))))
    assert store.num_judgements() == 2

    def breaks_off() -> None:
        with store.together():
            store.undo("anna")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaks_off()
    assert store.num_judgements() == 2


def test_a_study_remembers_what_it_was_told(path: str) -> None:
    with closing(begun(path, "anna")) as store:
        assert store.remember("tags", None, []) == []
        assert store.remember("tags", ["unsafe"]) == ["unsafe"]
    with closing(Store.open(path)) as again:
        assert again.remember("tags", None, []) == ["unsafe"]
