"""Responses are read while the file grows, found by their text, and never confused with other lines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel.errors import DataError
from keel.run.metrics_log import truncate_after
from keel.run.read import tail as growing
from keel.run.read.responses import ResponseLog, as_text
from keel.run.rollout_log import RolloutLog

SHORT = ("score", "kl", "length", "truncated", "scores")


def row(number: int, **more: Any) -> dict[str, Any]:
    """Return a response as a run logs it."""
    return {
        "score": number / 10,
        "kl": -number / 100,
        "length": 2,
        "truncated": number % 4 == 3,
        "scores": {"model": number / 10, "rule": float(number % 2)},
        "prompt": f"question {number % 3}",
        "response": f" answer {number}",
        "tokens": [5, 2],
        "pieces": [f" answer {number}", "</s>"],
        "logprobs": [-0.5, -0.1],
        **more,
    }


def write(path: Path, rows: Iterable[dict[str, Any]], step: int = 1) -> None:
    RolloutLog(path).log(step, rows)


def old_order(values: dict[str, Any]) -> dict[str, Any]:
    """Prompt and response first, as runs wrote them before; scores after the score."""
    names = ("prompt", "response", "score", "scores", "kl", "length", "truncated", "tokens", "logprobs")
    return {name: values[name] for name in names}


def read(path: Path) -> ResponseLog:
    answers = ResponseLog(path)
    answers.refresh()
    return answers


def figures(answers: ResponseLog) -> dict[str, list[Any]]:
    index = answers.index
    columns = {name: getattr(index, name).tolist() for name in ("step", "score", "kl", "length", "truncated")}
    return columns | {name: column.tolist() for name, column in index.scores.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "rollouts.jsonl"
    for step in (1, 2, 3):
        write(file, [row(3 * step + i) for i in range(3)], step)
    return file


def test_metrics_of_all_responses_are_in_memory(path: Path) -> None:
    answers = read(path)
    assert len(answers) == 9
    assert answers.step.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert answers.score.tolist() == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
    assert answers.kl.tolist() == [-0.03, -0.04, -0.05, -0.06, -0.07, -0.08, -0.09, -0.1, -0.11]
    assert answers.length.tolist() == [2] * 9
    assert answers.truncated.tolist() == [True, False, False, False, True, False, False, False, True]
    assert answers.scores["rule"].tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_rows_are_read_fully_and_in_the_requested_order(path: Path) -> None:
    first, second = read(path).rows([8, 0])
    assert first == {"step": 3, **row(11)}
    assert second == {"step": 1, **row(3)}


def test_the_field_order_of_earlier_versions_is_read(path: Path, tmp_path: Path) -> None:
    new = read(path)
    old = tmp_path / "old.jsonl"
    for step in (1, 2, 3):
        write(old, [old_order(row(3 * step + i)) for i in range(3)], step)
    answers = read(old)
    assert figures(answers) == figures(new)
    assert list(answers.texts(np.arange(9))) == list(new.texts(np.arange(9)))
    assert [(a.tolist(), b.tolist()) for a, b in answers.same_prompt(new)] == [
        ([i, i + 3, i + 6],) * 2 for i in range(3)
    ]
    assert answers.matching(text="answer 10").tolist() == [7]


def test_only_new_lines_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = read(path)
    before = answers.file.end
    write(path, [row(12)], 4)
    parsed: list[int] = []
    real = json.loads
    monkeypatch.setattr(
        "keel.run.read.response_index.json.loads", lambda text: (parsed.append(len(text)), real(text))[1]
    )
    assert answers.refresh() is False
    assert (len(answers), answers.step[-1]) == (10, 4)
    assert sum(parsed) < path.stat().st_size - before
    assert answers.refresh() is False
    assert len(parsed) == 1


@pytest.mark.parametrize("block", [1, 100, 1500, 4_000_000])
def test_the_block_size_makes_no_difference(path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = figures(read(path))
    monkeypatch.setattr(growing, "BLOCK", block)
    answers = read(path)
    assert figures(answers) == whole
    assert [row["response"] for row in answers.rows(range(9))] == [f" answer {i}" for i in range(3, 12)]


def test_reading_can_be_spread_over_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "BLOCK", 600)
    answers, sizes = ResponseLog(path), []
    while not answers.is_complete:
        answers.refresh(seconds=0)
        sizes.append(len(answers))
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 3
    assert figures(answers) == figures(read(path))


def test_reading_ends_where_the_file_was_truncated_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "BLOCK", 100_000)
    path.write_bytes(path.read_bytes() * 100)
    file = growing.GrowingFile(path)
    blocks = file.blocks()
    next(blocks)
    path.write_bytes(b"")
    assert sum(len(data) for _, data in blocks) < 100_000  # what was in the buffer of the open file
    assert file.was_cut()


def test_an_incomplete_line_is_read_once_it_is_complete(path: Path) -> None:
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    answers = ResponseLog(path)
    for end in range(begin, len(whole) + 1):
        path.write_bytes(whole[:end])
        answers.refresh()
        assert len(answers) == (9 if end == len(whole) else 8)
        assert answers.file.is_torn == (begin < end < len(whole))
        assert answers.broken == 0
    assert figures(answers) == figures(read(path))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_resumed_run_is_read_again(path: Path, kept: int) -> None:
    answers = read(path)
    truncate_after(path, kept)
    write(path, [row(20 + i) for i in range(3 * (4 - kept))], kept + 1)  # longer than before
    assert answers.refresh() is True
    assert figures(answers) == figures(read(path))
    assert answers.rows([len(answers) - 1])[0]["response"] == f" answer {19 + 3 * (4 - kept)}"


def test_a_removed_file_holds_nothing(path: Path) -> None:
    answers = read(path)
    path.unlink()
    assert answers.refresh() is True
    assert len(answers) == 0
    write(path, [row(1)])
    answers.refresh()
    assert len(answers) == 1


def test_without_a_file_there_are_no_responses(tmp_path: Path) -> None:
    answers = read(tmp_path / "none.jsonl")
    assert (len(answers), answers.matching(text="x").tolist(), answers.by_prompt()) == (0, [], {})


BROKEN = [
    "",
    "nonsense",
    "[1, 2]",
    "3",
    "null",
    '{"step": 1}',
    '{"step": "one", "score": 1, "kl": 0, "length": 1, "truncated": false, "scores": {}, "prompt": "p"}',
    '{"step": 1, "score": 1, "kl": 0, "length": 1, "truncated": false, "scores": [1], "prompt": "p", "response": "r"}',
    '{"step": 1e99, "score": "high", "kl": 0, "length": 1, "truncated": false, "scores": {}, "prompt": "p"}',
    '{"step": 1, "score": 1, "kl": 0, "length": 1, "truncated": false, "scores": {}, "prompt": "p", "response": "r", ',
    "[" * 100_000,
    "\x00\xff",
]


def test_lines_without_a_response_are_skipped_and_counted(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("wb") as file:
        for number, broken in enumerate(BROKEN):
            file.write(lines[number % 9])
            file.write(broken.encode("latin-1") + b"\n")
    answers = read(path)
    assert (len(answers), answers.broken) == (len(BROKEN), len(BROKEN))
    assert answers.step.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 1, 1, 1]


def test_an_invalid_number_is_a_gap(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    text = json.dumps({"step": 1, **row(1)})
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "null"):
        with file.open("a") as lines:
            lines.write(text.replace('"score": 0.1', f'"score": {value}').replace("-0.5", value) + "\n")
    answers = read(file)
    assert np.isnan(answers.score).all()
    assert [(each["score"], each["logprobs"]) for each in answers.rows(range(5))] == [(None, [None, -0.1])] * 5
    assert answers.matching(score=(None, 5)).tolist() == []


def test_text_that_looks_like_the_keys_of_a_line_is_text(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    trap = 'x", "response": "y", "tokens": [1], "prompt": "z'
    rows = [row(1, prompt=trap, response=trap), row(2, scores={"a": 1.0, "prompt": 2.0, "response": 3.0}), row(3)]
    write(file, rows)
    answers = read(file)
    assert (len(answers), answers.broken) == (3, 0)
    texts = [(number, prompt, response) for number, prompt, response in answers.texts(np.arange(3))]
    assert texts == [(0, trap, trap), (1, "question 2", " answer 2"), (2, "question 0", " answer 3")]
    assert answers.rows([0, 1, 2]) == [{"step": 1, **each} for each in rows]


def test_matches_are_within_all_bounds(path: Path) -> None:
    answers = read(path)
    assert answers.matching().tolist() == list(range(9))
    assert answers.matching(score=(0.5, 0.9)).tolist() == [2, 3, 4, 5, 6]
    assert answers.matching(score=(0.5, None), kl=(-0.07, None)).tolist() == [2, 3, 4]
    assert answers.matching(step=(2, 2)).tolist() == [3, 4, 5]
    assert answers.matching(length=(None, 1)).tolist() == []
    assert answers.matching(truncated=True).tolist() == [0, 4, 8]
    assert answers.matching(truncated=False, step=(3, None)).tolist() == [6, 7]
    assert answers.matching(step=(2, 3), text="question 1").tolist() == [4, 7]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ('He said "No"', 'said "no"'),
        ("two\nlines", "two\nlines"),
        ("tab\tand \\ stroke", "\\ stroke"),
        ("STRASSE und Straße", "straße"),
        ("Ünïcödé", "ünïcödé"),
        ("\U0001f600 smile", "\U0001f600"),
        ("a </script> b", "</SCRIPT>"),
        ("50% off_now", "off_"),
        ("half \ud800 of a pair", "of a pair"),
    ],
)
def test_text_is_found_in_any_case(tmp_path: Path, said: str, wanted: str) -> None:
    file = tmp_path / "rollouts.jsonl"
    lines = [json.dumps({"step": 1, **row(i, response=text)}) for i, text in enumerate(["nothing", said, "else"])]
    file.write_text("\n".join(lines) + "\n")
    answers = read(file)
    assert answers.matching(text=wanted).tolist() == [1]
    assert answers.matching(text="response").tolist() == []  # a key of each line, not its text


def test_text_is_found_in_the_prompt_of_a_chat(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    chat = [{"role": "user", "content": "Where is my lamp?"}]
    write(file, [row(0), row(1, prompt=chat)])
    assert read(file).matching(text="MY LAMP").tolist() == [1]
    assert as_text(chat) == "user: Where is my lamp?"


def test_equal_prompts_of_two_runs_are_paired(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    write(other, [row(0, prompt="question 2"), row(1, prompt="another"), row(2, prompt="question 0"), row(5)])
    here, there = read(path), read(other)
    pairs = [(own.tolist(), others.tolist()) for own, others in here.same_prompt(there)]
    assert pairs == [([0, 3, 6], [2]), ([2, 5, 8], [0, 3])]


def test_only_the_end_of_a_long_file_can_be_read(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    for lost in (0, 1, 40, len(lines[-2]) - 1):  # bytes of the last line but one, and everything up to them
        answers = ResponseLog(path, start=path.stat().st_size - len(lines[-1]) - len(lines[-2]) + lost)
        answers.refresh()
        assert answers.score.tolist() == ([1.0, 1.1] if lost == 0 else [1.1])
    write(path, [row(50)], 4)
    answers.refresh()
    assert answers.score.tolist() == [1.1, 5.0]


def test_a_file_that_changed_while_it_is_read_is_an_error(path: Path) -> None:
    answers = read(path)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match="holds no response"):
        answers.rows([3])
    assert list(answers.texts(np.arange(2))) == [(0, "", ""), (1, "", "")]
