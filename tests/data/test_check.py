"""`keel data check`: everything in a file is counted, everything broken is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel.data.check import check_report, check_verdict
from keel.data.contents import read_contents
from keel.errors import DataError

CHAT = [{"role": "user", "content": "Is  it\ncold?"}]


def write(path: Path, *rows: dict[str, Any] | str) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def checked(path: str, *against: str, column: str = "prompt") -> dict[str, Any]:
    others = [read_contents(other, column=column) for other in against]
    return check_report(read_contents(path, column=column), others)


RANKINGS: list[dict[str, Any] | str] = [
    {"prompt": "one", "responses": ["a", "bbb", "cc"], "ranks": [2, 1, 1], "rater": "anna", "source": "x"},
    {"prompt": "one", "responses": ["a", "bbb", "cc"], "ranks": [1, 2, None], "rater": "ben", "source": "x"},
    {"prompt": "one", "responses": ["bbb", "a", "cc"], "ranks": [1, 2, 1], "rater": "anna"},  # the first one again
    "{broken",
    {"prompt": CHAT, "chosen": "", "rejected": "12345"},
    {"prompt": "two", "responses": ["a", "b"], "ranks": [1, 0]},
    {"prompt": "two"},
    "",
    {"prompt": "two", "responses": ["same", "same"], "scores": [1, 0]},
]


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Any]:
    return checked(write(tmp_path / "rows.jsonl", *RANKINGS))


def test_every_broken_line_is_named_to_the_end(figures: dict[str, Any]):
    assert (figures["rows"], figures["usable"], figures["broken"]["rows"]) == (8, 5, 3)
    why = {entry["line"]: entry["what"] for entry in figures["broken"]["why"]}
    assert list(why) == [4, 6, 7]
    assert why[4].startswith("not JSON")
    assert "an integer from 1" in why[6]
    assert 'needs "chosen" and "rejected", or "responses"' in why[7]
    assert check_verdict(figures) == "3 of 8 rows cannot be used"


def test_what_a_file_holds(figures: dict[str, Any]):
    assert (figures["purpose"], figures["forms"]) == ("comparisons", {"rankings": 4, "pairs": 1})
    assert figures["prompts"]["distinct"] == 3
    assert figures["prompts"]["kinds"] == {"text": 4, "chat": 1}
    assert figures["prompts"]["characters"] == {"median": 3, "p95": 3, "longest": 12}
    assert figures["answers"]["per_row"] == {2: 2, 3: 3}
    assert figures["answers"]["characters"] == {"median": 2, "p95": 4, "longest": 5}
    assert figures["answers"]["empty"] == {"rows": 1, "lines": [5]}
    assert (figures["raters"], figures["sources"]) == ({"anna": 2, "ben": 1}, {"x": 2})


def test_what_a_file_prefers(figures: dict[str, Any]):
    told = figures["preferences"]
    # anna: bbb and cc over a, twice; ben: a over bbb; the chat; same over same. Ties: bbb and cc, twice
    assert (told["told_apart"], told["tied_share"]) == (7, pytest.approx(2 / 9))
    assert told["not_ranked_share"] == pytest.approx(1 / 13)
    assert told["chosen_longer_share"] == pytest.approx(4 / 6)
    assert told["same_answer_both_ways"] == {"rows": 1, "lines": [9]}
    assert told["contradictions"] == {"pairs": 1, "one_rater": 0, "rows": 2, "lines": [2, 3]}
    assert figures["duplicates"] == {"rows": 1, "lines": [3]}


def test_a_person_who_says_both_contradicts_himself(tmp_path: Path):
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("xy", "yx", "xz", "xy")]
    figures = checked(write(tmp_path / "rows.jsonl", *rows))
    assert figures["preferences"]["contradictions"] == {"pairs": 1, "one_rater": 1, "rows": 2, "lines": [2, 4]}
    assert figures["duplicates"] == {"rows": 1, "lines": [4]}
    assert check_verdict(figures) == ""


def test_prompts_of_another_file_leak_whatever_their_form(tmp_path: Path):
    mine = write(
        tmp_path / "mine.jsonl", *({"prompt": p, "chosen": "a", "rejected": "b"} for p in ("x", " IS it cold?", "y"))
    )
    other = write(tmp_path / "other.jsonl", {"prompt": CHAT}, {"prompt": "z"})
    broken = write(tmp_path / "broken.jsonl", {"prompt": "q"}, "{")
    figures = checked(mine, other, broken)
    assert figures["leaks"] == [
        {"file": other, "prompts": 1, "unread": 0, "rows": 1, "lines": [2]},
        {"file": broken, "prompts": 0, "unread": 1, "rows": 0, "lines": []},
    ]
    assert check_verdict(figures) == f"1 row with prompts of {other}, 1 row of {broken} cannot be read"


KINDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "p", "answer": 3}, "prompts", "prompts"),
    ({"prompt": "p", "completion": "c"}, "texts", "prompt and completion"),
    ({"prompt": CHAT, "completion": [{"role": "assistant", "content": "c"}]}, "texts", "prompt and completion"),
    ({"text": "t", "label": 1}, "texts", "text"),
    ({"prompt": "p", "responses": ["a", "b"]}, "answers", "answers to be ranked"),
    ({"context": "p", "completions": [{"rank": 0, "completion": "a"}, {"rank": 1, "completion": "b"}]}, "comparisons",
     "NeMo completions"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "purpose", "form"), KINDS)
def test_the_columns_say_what_a_file_is_for(row: dict[str, Any], purpose: str, form: str, tmp_path: Path):
    figures = checked(write(tmp_path / "rows.jsonl", row, row))
    assert (figures["purpose"], figures["forms"], figures["usable"]) == (purpose, {form: 2}, 2)
    assert figures["duplicates"] == {"rows": 1, "lines": [2]}
    assert check_verdict(figures) == ""


def test_prompts_in_a_column_of_another_name(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"})
    assert check_verdict(checked(path)) == "no row can be used"
    assert checked(path, column="question")["prompts"]["distinct"] == 1


def test_only_ties_are_nothing_to_learn_from(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]})
    assert check_verdict(checked(path)) == "no row prefers one response to another"


def test_an_empty_file_and_one_that_is_not_there(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "rows.parquet")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for path in (write(tmp_path / "rows.jsonl"), tmp_path / "blank.jsonl", tmp_path / "rows.parquet"):
        with pytest.raises(DataError, match="has no rows"):
            read_contents(str(path))
    with pytest.raises(DataError, match="No such file"):
        read_contents(str(tmp_path / "other.jsonl"))


def test_the_reader_of_the_training_verbs_accepts_exactly_what_is_usable(tmp_path: Path):
    from keel.data.preferences import load_rankings

    path = write(tmp_path / "rows.jsonl", *RANKINGS)
    contents = read_contents(path)
    with pytest.raises(DataError) as caught:
        load_rankings(path)
    assert caught.value.where == contents.broken[0].where
    sound = write(tmp_path / "sound.jsonl", *(RANKINGS[entry.number - 1] for entry in contents.entries))
    assert load_rankings(sound) == contents.rankings
