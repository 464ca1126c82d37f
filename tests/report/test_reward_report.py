"""The report of a reward model says what its held-out scores say, and shows texts as texts."""

import json
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel.data.preferences import Ranking
from keel.errors import DataError
from keel.report.reward_checks import (
    HeldOutRankings,
    accuracy_groups,
    length_correlation,
    mistakes,
    pair_lengths,
    similar_lengths,
)
from keel.report.reward_report import write_reward_report
from keel.stats import preference_metrics as judging


def pair(better: str, worse: str, prompt: str = "p", **fields: Any) -> Ranking:
    return Ranking(prompt, (better, worse), (1, 2), **fields)


def held_out(*rows: tuple[Ranking, list[float]], members: list[list[list[float]]] | None = None) -> HeldOutRankings:
    return HeldOutRankings([ranking for ranking, _ in rows], [scores for _, scores in rows], members or [])


def test_the_temperature_is_the_one_that_fits():
    """Three of four right, each by 2, and a coin: sigma(2 / T) = 3.5 / 5 at T = 2 / ln(7/3)."""
    rows = [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]
    pairs = judging.build_pairs(rows, [pair("a", "b", prompt=str(i)) for i in range(4)])
    assert judging.temperature(pairs) == pytest.approx(2 / log(7 / 3), rel=1e-9)
    assert judging.loss(pairs.scale(log(3) / 2)) == pytest.approx(0.5623351446, abs=1e-9)
    # one pair and the coin: 1.5 to 0.5 if right; never, if wrong
    assert judging.temperature(judging.build_pairs([[2.0, 0.0]], [pair("a", "b")])) == pytest.approx(
        2 / log(3), rel=1e-9
    )
    assert judging.temperature(judging.build_pairs([[0.0, 2.0]], [pair("a", "b")])) == pytest.approx(100, rel=1e-6)
    many = [pair("a", "b", prompt=str(i)) for i in range(1000)]
    scores = [[2.0, 0.0]] * 750 + [[0.0, 2.0]] * 250
    assert judging.temperature(judging.build_pairs(scores, many)) == pytest.approx(2 / log(3), rel=2e-3)


def test_no_prompt_is_calibrated_by_itself():
    """Each half of the prompts is divided by what fits the other, whose n pairs are all right: n + 1/2 to 1/2."""
    rankings = [pair("a", "b", prompt=str(i)) for i in range(40)]
    halves = [judging.calibrate_pairs(judging.build_pairs([[1.0, 0.0]], [ranking]), [ranking]) for ranking in rankings]
    assert all(part.differences.tolist() == [1.0] for part in halves)  # nothing to learn a temperature from
    pairs = judging.build_pairs([[1.0, 0.0]] * 40, rankings)
    after = judging.calibrate_pairs(pairs, rankings)
    halves = sorted(after.differences)
    count = halves.count(halves[0])
    expected = [log(2 * n + 1) for n in (40 - count, count)]
    assert sorted(set(np.round(after.differences, 6))) == sorted(set(np.round(expected, 6)))


def test_weights_count_rankings_and_not_their_pairs():
    """A ranking of three pairs that are all right, weight 1, beside a pair that is wrong, weight 3: one in four."""
    rankings = [Ranking("p", ("a", "b", "c"), (1, 2, 3)), pair("a", "b", prompt="q", weight=3.0)]
    pairs = judging.build_pairs([[3.0, 2.0, 1.0], [0.0, 1.0]], rankings)
    assert judging.accuracy(pairs) == pytest.approx(0.25)


def test_the_interval_is_over_prompts():
    """Ten answers to one prompt, all right, and ten to another, all wrong: two prompts say next to nothing."""
    rankings = [pair("a", "b", prompt="p")] * 10 + [pair("a", "b", prompt="q")] * 10
    scores = [[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 10
    low, high = judging.accuracy_interval(judging.build_pairs(scores, rankings), rankings)
    assert low < 0.01
    assert high > 0.99
    many = [pair("a", "b", prompt=str(i)) for i in range(100)]
    low, high = judging.accuracy_interval(judging.build_pairs([[1.0, 0.0]] * 75 + [[0.0, 1.0]] * 25, many), many)
    assert (low, high) == (pytest.approx(0.665, abs=0.02), pytest.approx(0.835, abs=0.02))  # 0.75 +- 1.96 * 0.0433


def test_length_is_looked_at_within_a_prompt():
    rows = held_out(
        (Ranking("p", ("a", "bb", "ccc"), (1, 2, 3)), [1.0, 2.0, 3.0]),
        (Ranking("q", ("a", "bb", "ccc"), (1, 2, 3)), [3.0, 2.0, 1.0]),
        (Ranking("r", ("aaaa", "bb", "c"), (1, 2, 2)), [3.0, 2.0, 1.0]),
    )
    assert length_correlation(rows) == pytest.approx((1 - 1 + 1) / 3)
    better, worse = pair_lengths(rows, rows.pairs)
    assert list(zip(better, worse, strict=True))[-2:] == [(4, 2), (4, 1)]
    near = held_out((pair("x" * 100, "y" * 91), [1.0, 0.0]), (pair("x" * 100, "y" * 80), [1.0, 0.0]))
    assert similar_lengths(near, near.pairs).tolist() == [True, False]


def test_mistakes_come_surest_first_and_once_a_ranking():
    rows = held_out(
        (pair("good", "bad", prompt="small"), [0.0, log(3)]),
        (Ranking("two", ("good", "bad", "worse"), (1, 2, 3)), [0.0, 5.0, 1.0]),
        (pair("good", "bad", prompt="right"), [1.0, 0.0]),
    )
    found = mistakes(rows)
    assert [row["prompt"] for row in found] == ["two", "small"]
    assert (found[0]["better"], found[0]["worse"]) == ("good", "bad")
    assert found[1]["confidence"] == pytest.approx(0.75)


def test_groups_tell_raters_and_sources_apart_and_leave_small_ones_out():
    rows = [(pair("a", "b", prompt=str(i), rater="anna", source="x"), [1.0, 0.0]) for i in range(30)]
    rows += [(pair("a", "b", prompt=str(i), rater="ben", source="y"), [0.0, 1.0]) for i in range(30)]
    rows += [(pair("a", "b", prompt="z", rater="eve", source="y"), [0.0, 1.0])] * 5
    found = accuracy_groups(held_out(*rows))
    assert {group.name: (group.pairs, group.accuracy) for group in found["rater"]} == {
        "anna": (30, pytest.approx(1.0)),
        "ben": (30, pytest.approx(0.0)),
    }
    assert [(group.name, group.pairs) for group in found["source"]] == [("x", 30), ("y", 35)]
    assert "disagreement of the members" not in found


EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'
FIGURES = {
    "accuracy": 0.7,
    "accuracy_low": 0.6,
    "accuracy_high": 0.8,
    "loss": 0.6,
    "calibration_error": 0.1,
    "temperature": 2.0,
    "calibrated_loss": 0.55,
    "calibrated_error": 0.05,
    "length_accuracy": 0.5,
    "length_sign": 1.0,
    "ahead_of_length": 0.2,
    "prompts_on_both_sides": 0.0,
}


def run_with(folder: Path, rankings: list[Ranking], scores: list[list[float]]) -> Path:
    rows = [ranking.__dict__ | {"scores": row} for ranking, row in zip(rankings, scores, strict=True)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "figures.json").write_text(json.dumps(FIGURES))
    (folder / "config.yaml").write_text(f"model: {json.dumps(EVIL)}\nmembers: 1\nmember_models: []\n")
    return folder


def test_texts_are_shown_as_texts_and_the_page_loads_nothing(tmp_path: Path):
    rankings = [pair(EVIL, "b" + EVIL, prompt=EVIL + str(i), rater=EVIL, source=EVIL + str(i % 2)) for i in range(50)]
    page = write_reward_report(str(run_with(tmp_path, rankings, [[0.0, 1.0]] * 50)))
    assert page is not None
    text = page.read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert not [bad for bad in ("<script", "<img", 'onerror="', "http://", "https://", "@import") if bad in text]
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_line_ends_that_only_texts_know_are_no_line_ends(tmp_path: Path):
    rankings = [pair("a\u2028b\u0085c", "d", prompt=str(i)) for i in range(30)]
    run_with(tmp_path, rankings, [[1.0, 0.0]] * 30)
    lines = (json.dumps(ranking.__dict__ | {"scores": [1.0, 0.0]}, ensure_ascii=False) for ranking in rankings)
    (tmp_path / "held_out.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    assert len(HeldOutRankings.read(tmp_path).rankings) == 30


def test_a_run_without_held_out_scores(tmp_path: Path):
    run_with(tmp_path, [], [])
    assert write_reward_report(str(tmp_path)) is None
    (tmp_path / "held_out.jsonl").write_text("{")
    with pytest.raises(DataError, match="held-out scores cannot be read"):
        write_reward_report(str(tmp_path))
