"""Comparisons in the formats of other tools, and every fault of a row."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel.data.formats import detect_form
from keel.data.preferences import Ranking, load_rankings
from keel.data.rows import Row
from keel.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HELLO = "\n\nHuman: Hello\n\nAssistant:"
CHAT = [user("p")]
NEMO = {"context": CHAT, "completions": [{"rank": 1, "completion": [assistant("b")]},
                                         {"rank": 0, "completion": [assistant("a")]}]}  # fmt: skip
ULTRA = {
    "prompt": "p",
    "prompt_id": "1f",
    "chosen": [user("p"), assistant("a")],
    "rejected": [user("p"), assistant("b")],
    "messages": [user("p"), assistant("a")],
    "score_chosen": 8.5,
    "score_rejected": 7.0,
}
OPENAI = {"query": "q", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "d", "best": 2}

FORMS: list[tuple[str, dict[str, Any], Ranking]] = [
    ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}, Ranking("p", ("a", "b"), (2, 1))),
    (
        "rankings",
        {"prompt": CHAT, "responses": ["a", "b", "c", "d"], "scores": [0.5, -1, None, 0.5]},
        Ranking(CHAT, ("a", "b", "c", "d"), (1, 2, None, 1)),
    ),
    ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b"}, Ranking("p", ("a", "b"), (1, 2))),
    (
        "pairs",
        {"prompt": CHAT, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        Ranking(CHAT, ("a", "b"), (1, 2)),
    ),
    ("transcripts", {"chosen": HELLO + " Hi", "rejected": HELLO + " No"}, Ranking(HELLO, (" Hi", " No"), (1, 2))),
    (
        "transcripts",
        {"chosen": [*CHAT, assistant("a")], "rejected": [*CHAT, assistant("b")]},
        Ranking(CHAT, ("a", "b"), (1, 2)),
    ),
    ("scored pairs", ULTRA, Ranking(CHAT, ("a", "b"), (1, 2))),
    ("scored pairs", ULTRA | {"score_rejected": 8.5}, Ranking(CHAT, ("a", "b"), (1, 1))),
    ("NeMo completions", NEMO, Ranking(CHAT, ("b", "a"), (2, 1))),
    (
        "NeMo completions",
        {
            "context": "p",
            "completions": [{"rank": rank, "completion": text} for rank, text in ((3, "x"), (3, ""), (-1, "z"))],
        },
        Ranking("p", ("x", "", "z"), (2, 2, 1)),
    ),
    ("NeMo completions", NEMO | {"context": "p"}, Ranking(CHAT, ("b", "a"), (2, 1))),
    ("OpenAI comparisons", OPENAI, Ranking("q", ("a", "b", "c", "d"), (2, 2, 1, 2))),
]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("form", "row", "expected"), FORMS)
def test_every_form_becomes_a_ranking(form: str, row: dict[str, Any], expected: Ranking, tmp_path: Path):
    assert detect_form(Row(1, row)) == form
    plain = {"prompt": "p", "chosen": "a", "rejected": "b"}  # another row, so that a tie alone is no empty file
    assert load_rankings(write(tmp_path / "rows.jsonl", row, plain))[0] == expected


def test_all_forms_in_one_file_with_columns_of_nulls(tmp_path: Path):
    """In a Parquet file, every row has every column."""
    columns = dict.fromkeys(name for _, row, _ in FORMS for name in row)
    rows = [dict.fromkeys(columns) | row for _, row, _ in FORMS]
    assert load_rankings(write(tmp_path / "rows.jsonl", *rows)) == [expected for *_, expected in FORMS]


def test_rater_weight_and_source_come_with_every_form(tmp_path: Path):
    known = {"rater": "anna", "weight": 0.5, "source": "s"}
    for ranking in load_rankings(write(tmp_path / "rows.jsonl", *(row | known for _, row, _ in FORMS))):
        assert (ranking.rater, ranking.weight, ranking.source) == ("anna", 0.5, "s")


def test_other_columns_are_no_comparison():
    for row in ({"prompt": "p"}, {"prompt": "p", "completion": "c"}, {"text": "t"}, {"query": "q"}, {"chosen": None}):
        assert detect_form(Row(1, row)) is None


BAD = [
    (NEMO | {"completions": [NEMO["completions"][0]]}, '"completions" is not a list of at least two'),  # type: ignore[index]
    (NEMO | {"completions": "ab"}, 'expected a list in "completions", got text'),
    (NEMO | {"completions": [{"rank": 1}, {"rank": 2}]}, 'no column "completion"'),
    (NEMO | {"completions": [{"rank": "1", "completion": "a"}] * 2}, 'expected a number in "rank", got text'),
    (NEMO | {"completions": [{"rank": 1e999, "completion": "a"}] * 2}, "not a finite number"),
    (
        NEMO | {"completions": [{"rank": 1, "completion": [user("a")]}] * 2},
        '"completion" must be one assistant message',
    ),
    (NEMO | {"context": " "}, '"context" is empty'),
    (OPENAI | {"best": 4}, '"best" is 4; give the number of one of sample0 to sample3'),
    (OPENAI | {"best": -1}, '"best" is -1'),
    (OPENAI | {"best": 1.5}, '"best" is 1.5; give'),
    (OPENAI | {"best": True}, 'expected a number in "best"'),
    ({"query": "q", "sample0": "a", "best": 0}, "one of sample0 to sample0"),
    ({"query": "q", "best": 0}, '"best" is 0'),
    ({"query": "q", "sample0": "a", "sample2": "b", "best": 0}, 'no column "sample1"'),
    (OPENAI | {"sample1": None}, 'expected text in "sample1", got null'),
    (ULTRA | {"score_chosen": 1.0}, '"score_chosen" is 1, less than "score_rejected", 7'),
    (ULTRA | {"score_chosen": "8"}, 'expected a number in "score_chosen"'),
    (ULTRA | {"rejected": [user("q"), assistant("b")]}, "one assistant message each, after the same messages"),
    (ULTRA | {"prompt": [user("other")]}, '"prompt" differs from the messages before the responses'),
    (ULTRA | {"chosen": [user("p")]}, "one assistant message each"),
    ({"chosen": "a", "rejected": "b"}, "share no beginning"),
    ({"prompt": "p", "chosen": "a"}, 'no column "rejected"'),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1}, '"weight" is -1'),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named(row: dict[str, Any], reason: str, tmp_path: Path):
    text = json.dumps(row).replace("Infinity", "1e999")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n" + text + "\n")
    with pytest.raises(DataError) as caught:
        load_rankings(str(path))
    assert caught.value.where == f"{path}:2"
    assert reason in str(caught.value)
