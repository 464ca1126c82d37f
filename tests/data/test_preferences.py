"""Pairs and rankings in every format, and every fault of a row."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel.data.preferences import Ranking, load_rankings, split_by_prompt, to_pairs
from keel.errors import DataError


def load(tmp_path: Path, *rows: dict[str, Any]) -> list[Ranking]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rankings(str(path))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_pairs(tmp_path: Path):
    plain, with_margin = load(
        tmp_path,
        {"prompt": "p", "chosen": "good", "rejected": ""},
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
    )
    assert plain == Ranking("p", ("good", ""), (1, 2))
    assert plain.pairs == [(0, 1)]
    assert with_margin.margin == 2.0


def test_the_prompt_may_be_inside_two_transcripts(tmp_path: Path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Well?\n\nAssistant:"
    [pair] = load(tmp_path, {"chosen": start + " So so.", "rejected": start + " So what."})
    assert (pair.prompt, pair.responses) == (start, (" So so.", " So what."))


def test_transcripts_that_differ_earlier_have_a_shorter_prompt(tmp_path: Path):
    start = "\n\nHuman: Hi\n\nAssistant:"
    rest = " Hello\n\nHuman: Well?\n\nAssistant: Yes"
    [pair] = load(tmp_path, {"chosen": start + rest, "rejected": start + " No"})
    assert (pair.prompt, pair.responses) == (start, (rest, " No"))


CHATS = [
    {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    {"prompt": "p", "chosen": [assistant("a")], "rejected": [assistant("b")]},
    {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
    {"prompt": "p", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
]


@pytest.mark.parametrize("row", CHATS)
def test_chats_in_the_forms_in_use(tmp_path: Path, row: dict[str, Any]):
    assert load(tmp_path, row) == [Ranking([user("p")], ("a", "b"), (1, 2))]


def test_ranks_and_scores_are_equivalent(tmp_path: Path):
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"]}
    by_rank, by_score = load(
        tmp_path, {**row, "ranks": [2, 1, None, 1]}, {**row, "scores": [-1.5, 3, None, 3.0], "ranks": None}
    )
    assert by_rank == by_score
    assert by_rank.ranks == (2, 1, None, 1)
    assert by_rank.pairs == [(1, 0), (3, 0)]
    assert by_rank.ranked == Ranking("p", ("b", "d", "a"), (1, 1, 2))


def test_ties_and_unranked_responses_give_no_pair():
    rankings = [Ranking("p", ("a", "b", "c", "d"), (2, 1, None, 1)), Ranking("q", ("x", "y"), (1, 1))]
    assert to_pairs(rankings) == [Ranking("p", ("b", "a"), (1, 2)), Ranking("p", ("d", "a"), (1, 2))]


def test_a_full_ranking_gives_every_pair():
    assert len(to_pairs([Ranking("p", tuple("abcde"), (3, 1, 5, 2, 4))])) == 10


BAD = [
    ({"prompt": "p", "answer": "x"}, 'needs "chosen" and "rejected", or "responses"'),
    ({"prompt": "p", "chosen": "x", "rejectd": "y"}, "did you mean 'rejectd'"),
    ({"prompt": "p", "chosen": "x", "rejected": 3}, 'expected text or a list in "rejected", got a number'),
    ({"prompt": "p", "chosen": "x", "rejected": [assistant("y")]}, "of different kinds"),
    ({"prompt": " ", "chosen": "x", "rejected": "y"}, '"prompt" is empty'),
    ({"chosen": "x", "rejected": "y"}, "share no beginning"),
    ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": "1"}, 'expected a number in "margin"'),
    ({"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "one assistant message each"),
    ({"chosen": [user("p")], "rejected": [user("p")]}, "one assistant message each"),
    ({"prompt": "p", "responses": ["a"], "ranks": [1]}, "at least two texts"),
    ({"prompt": "p", "responses": ["a", 2], "ranks": [1, 2]}, "at least two texts"),
    ({"prompt": "p", "responses": ["a", "b"]}, 'either "ranks"'),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "scores": [1, 2]}, 'either "ranks"'),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, '1 "ranks" for 2 responses'),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}, "an integer from 1"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [1.5, 1]}, "an integer from 1"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [True, 1]}, "a number or null"),
    ({"responses": ["a", "b"], "scores": [0, 1]}, 'no column "prompt"'),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], reason: str):
    with pytest.raises(DataError) as caught:
        load(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, row)
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:2"
    assert reason in str(caught.value)


def test_data_without_any_preference_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no row prefers one response"):
        load(tmp_path, {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]})


def test_no_prompt_is_on_both_sides_of_a_split():
    rows = [(f"prompt {i % 40}" + " " * (i % 3), i) for i in range(200)]
    train, held_out = split_by_prompt(rows, lambda row: row[0], 0.25, seed=3)
    sides = [{prompt.strip() for prompt, _ in side} for side in (train, held_out)]
    assert [len(side) for side in sides] == [30, 10]
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == 200


def test_a_split_depends_on_the_seed_and_not_on_the_order():
    rows = [f"prompt {i}" for i in range(50)]
    held_out = [
        set(split_by_prompt(given, str, 0.2, seed)[1]) for given, seed in ((rows, 1), (rows[::-1], 1), (rows, 2))
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def test_nothing_is_held_out_on_request_and_never_everything():
    assert split_by_prompt(["a", "b"], str, 0.0, seed=0) == (["a", "b"], [])
    with pytest.raises(DataError, match="cannot hold out 1 of 1"):
        split_by_prompt(["a", "a"], str, 0.1, seed=0)
