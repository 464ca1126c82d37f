"""`keel data check`: all contents are counted, and all faults are reported."""

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
def metrics(tmp_path: Path) -> dict[str, Any]:
    return checked(write(tmp_path / "rows.jsonl", *RANKINGS))


def test_every_broken_line_is_reported(metrics: dict[str, Any]):
    assert (metrics["rows"], metrics["usable"], metrics["broken"]["rows"]) == (8, 5, 3)
    why = {entry["line"]: entry["what"] for entry in metrics["broken"]["why"]}
    assert list(why) == [4, 6, 7]
    assert why[4].startswith("not JSON")
    assert "an integer from 1" in why[6]
    assert 'needs "chosen" and "rejected", or "responses"' in why[7]
    assert check_verdict(metrics) == "3 of 8 rows cannot be used"


def test_contents_of_a_file(metrics: dict[str, Any]):
    assert (metrics["purpose"], metrics["forms"]) == ("comparisons", {"rankings": 4, "pairs": 1})
    assert metrics["prompts"]["distinct"] == 3
    assert metrics["prompts"]["kinds"] == {"text": 4, "chat": 1}
    assert metrics["prompts"]["characters"] == {"median": 3, "p95": 3, "longest": 12}
    assert metrics["answers"]["per_row"] == {2: 2, 3: 3}
    assert metrics["answers"]["characters"] == {"median": 2, "p95": 4, "longest": 5}
    assert metrics["answers"]["empty"] == {"rows": 1, "lines": [5]}
    assert (metrics["raters"], metrics["sources"]) == ({"anna": 2, "ben": 1}, {"x": 2})


def test_preferences_of_a_file(metrics: dict[str, Any]):
    preferences = metrics["preferences"]
    # anna: bbb and cc over a, twice; ben: a over bbb; the chat; same over same. Ties: bbb and cc, twice
    assert (preferences["told_apart"], preferences["tied_share"]) == (7, pytest.approx(2 / 9))
    assert preferences["not_ranked_share"] == pytest.approx(1 / 13)
    assert preferences["chosen_longer_share"] == pytest.approx(4 / 6)
    assert preferences["same_answer_both_ways"] == {"rows": 1, "lines": [9]}
    assert preferences["contradictions"] == {"pairs": 1, "one_rater": 0, "rows": 2, "lines": [2, 3]}
    assert metrics["duplicates"] == {"rows": 1, "lines": [3]}


def test_a_rater_who_orders_a_pair_both_ways_is_a_contradiction(tmp_path: Path):
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("xy", "yx", "xz", "xy")]
    metrics = checked(write(tmp_path / "rows.jsonl", *rows))
    assert metrics["preferences"]["contradictions"] == {"pairs": 1, "one_rater": 1, "rows": 2, "lines": [2, 4]}
    assert metrics["duplicates"] == {"rows": 1, "lines": [4]}
    assert check_verdict(metrics) == ""


def test_prompts_of_another_file_leak_whatever_their_form(tmp_path: Path):
    mine = write(
        tmp_path / "mine.jsonl", *({"prompt": p, "chosen": "a", "rejected": "b"} for p in ("x", " IS it cold?", "y"))
    )
    other = write(tmp_path / "other.jsonl", {"prompt": CHAT}, {"prompt": "z"})
    broken = write(tmp_path / "broken.jsonl", {"prompt": "q"}, "{")
    metrics = checked(mine, other, broken)
    assert metrics["leaks"] == [
        {"file": other, "prompts": 1, "unread": 0, "rows": 1, "lines": [2]},
        {"file": broken, "prompts": 0, "unread": 1, "rows": 0, "lines": []},
    ]
    assert check_verdict(metrics) == f"1 row with prompts of {other}, 1 row of {broken} cannot be read"


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
def test_the_columns_decide_the_purpose_of_a_file(row: dict[str, Any], purpose: str, form: str, tmp_path: Path):
    metrics = checked(write(tmp_path / "rows.jsonl", row, row))
    assert (metrics["purpose"], metrics["forms"], metrics["usable"]) == (purpose, {form: 2}, 2)
    assert metrics["duplicates"] == {"rows": 1, "lines": [2]}
    assert check_verdict(metrics) == ""


def test_prompts_in_a_column_of_another_name(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"})
    assert check_verdict(checked(path)) == "no row can be used"
    assert checked(path, column="question")["prompts"]["distinct"] == 1


def test_a_file_of_ties_only_has_no_preference(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]})
    assert check_verdict(checked(path)) == "no row prefers one response to another"


def test_empty_and_missing_files_are_refused(tmp_path: Path):
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


def test_labels_are_counted_and_contradictions_reported(tmp_path: Path):
    rows = [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "response": "b", "label": False},
        {"prompt": "p", "completion": "a", "label": False},
        {"prompt": "q", "completion": "a", "label": 1},
    ]
    metrics = checked(write(tmp_path / "labels.jsonl", *rows))
    assert metrics["purpose"] == "labels"
    assert metrics["labels"] == {
        "desirable": 1,
        "undesirable": 2,
        "contradictions": {"rows": 1, "lines": [3]},
    }
    assert metrics["duplicates"]["rows"] == 0
    assert [each["line"] for each in metrics["broken"]["why"]] == [4]
