"""What a report shows of answers: their spread, the same prompt early and late, a few of them token by token."""

from pathlib import Path

import numpy as np

from keel.report.responses import bands, compare_responses, distributions, early_and_late_responses, token_rows
from keel.run.read.responses import ResponseLog

from ..diagnosis.written import ANSWERS, answer, write_run


def answers_of(folder: Path, rows: list[dict[str, object]]) -> ResponseLog:
    found = ResponseLog(write_run(folder, answers=rows) / "rollouts.jsonl")
    found.refresh()
    return found


def test_bands_are_quantiles_of_stretches_of_steps():
    steps = np.repeat([1, 2, 3, 4], 4)
    values = np.concatenate([np.arange(1.0, 9.0), np.full(8, 5.0)])
    found = bands(steps, values)  # 16 answers: two stretches of eight
    assert found["steps"] == [1.5, 3.5]
    assert found["quantiles"] == [[1.35, 5.0], [2.75, 5.0], [4.5, 5.0], [6.25, 5.0], [7.65, 5.0]]


def test_what_does_not_vary_has_no_distribution(tmp_path: Path):
    rows = [answer(step, "p", "a b", None if step == 1 else float(step), kl=0.0) for step in (1, 2, 3)]
    found = distributions(answers_of(tmp_path / "run", rows))
    assert list(found) == ["score"]
    assert found["score"] == {"steps": [2.5], "quantiles": [[2.05], [2.25], [2.5], [2.75], [2.95]]}


def test_before_and_after_show_the_same_prompt(tmp_path: Path):
    found = early_and_late_responses(answers_of(tmp_path / "run", ANSWERS))
    assert found["same"]
    assert [
        (pair["what"], pair["prompts"], pair["before"]["step"], pair["after"]["step"]) for pair in found["pairs"]
    ] == [
        ("largest gain", ["Where is my drill?"], 1, 6),
        ("smallest gain, or loss", ["Thank you!"], 1, 6),
    ]
    assert found["pairs"][0]["changes"] == [("added", " I will look."), ("same", " who knows.")]


def test_without_a_common_prompt_the_most_alike_are_shown(tmp_path: Path):
    rows = [
        answer(1, "where is the red bike", "here", 0.0),
        answer(1, "good morning", "hello", 0.0),
        answer(2, "good evening", "bye", 1.0),
        answer(2, "where is the blue bike", "there", 1.0),
    ]
    found = early_and_late_responses(answers_of(tmp_path / "run", rows))
    assert not found["same"]
    assert [pair["prompts"] for pair in found["pairs"]] == [
        ["where is the red bike", "where is the blue bike"],
        ["good morning", "good evening"],
    ]
    assert early_and_late_responses(ResponseLog(tmp_path / "none.jsonl")) == {"same": False, "pairs": []}


def test_the_token_view_shows_best_worst_furthest_and_last(tmp_path: Path):
    rows = token_rows(answers_of(tmp_path / "run", ANSWERS))
    assert [(row["what"], row["response"]) for row in rows] == [
        ("best and highest KL", " I will look. who knows."),
        ("worst", " who knows."),
        ("last", " have a good day."),
    ]
    assert rows[1]["row"]["advantages"] == [0.5, -0.75]
    assert "response" not in rows[1]["row"]
    assert token_rows(ResponseLog(tmp_path / "none.jsonl")) == []


def test_runs_are_compared_on_a_prompt_that_all_were_asked(tmp_path: Path):
    first = answers_of(tmp_path / "a", ANSWERS)
    other = [answer(1, "Where is my drill?", "early", 0.0), answer(2, [{"role": "user", "content": "Hi"}], "x", 0.0)]
    second = answers_of(tmp_path / "b", [*other, answer(2, "Thank you!", "fine.", -1.0)])
    found = compare_responses([first, second])
    assert [(row["prompt"], [own["response"] for own in row["answers"]]) for row in found] == [
        ("Thank you!", [" have a good day.", "fine."])
    ]
    assert compare_responses([first]) == []
