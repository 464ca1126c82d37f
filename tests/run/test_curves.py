"""Curves and comparisons that a report plots, as plain values."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from keel.report.frontier import panels
from keel.report.settings import non_default_settings, reproduction
from keel.report.summary import ends, format_value, small_plot, tiles
from keel.run.read.compare import reward_kl_frontier, settings_differences, word_differences
from keel.run.read.curves import catalogue, labels, metric_groups, thin_curve, trend
from keel.run.read.run import read_run

from ..diagnosis.written import COLUMNS, settings, write_run

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_a_thinned_curve_keeps_its_ends_and_its_extremes():
    values = np.zeros(10_000)
    values[[0, 3_333, 7_777, 9_999]] = [1.0, 1e6, -1e6, 2.0]
    steps, kept = thin_curve(np.arange(1, 10_001), values, most=100)
    points = dict(zip(steps, kept, strict=True))
    assert len(points) == len(steps) <= 100
    assert {step: points[step] for step in (1, 3_334, 7_778, 10_000)} == {1: 1.0, 3_334: 1e6, 7_778: -1e6, 10_000: 2.0}
    assert steps == sorted(steps)


def test_a_short_curve_keeps_all_points_and_a_gap_is_none():
    assert thin_curve([1, 2, 3], [0.1234567, np.nan, np.inf]) == ([1, 2, 3], [0.123457, None, None])
    assert thin_curve([], []) == ([], [])


def test_a_long_gap_stays_a_gap_when_the_curve_is_thinned():
    values = np.ones(1_000)
    values[200:800] = np.nan
    steps, kept = thin_curve(np.arange(1_000), values, most=40)
    assert all((value is None) == (200 <= step < 800) for step, value in zip(steps, kept, strict=True))


def test_the_trend_of_a_long_curve_is_its_means():
    values = np.tile([0.0, 2.0], 600)
    found = trend(np.arange(1_200), values)
    assert found is not None
    assert (len(found["steps"]), set(found["values"])) == (120, {1.0})
    assert found["steps"][:2] == [4.5, 14.5]
    assert trend(np.arange(300), values[:300]) is None


def test_groups_have_the_measured_metrics_only(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run"))
    found = {group["title"]: group["curves"] for group in metric_groups(run)}
    assert {title: [(curve["figure"], curve["label"]) for curve in curves] for title, curves in found.items()} == {
        "Scores": [
            ("objective/scores", "Score"),  # rewards/judge is equal and left out
            ("objective/kl", "KL to the reference"),
            ("rewards/gold", "Score by gold, held out"),
            ("objective/kl_coef", "Weight of the KL"),
        ],
        "Responses": [("response/length", "Length"), ("policy/entropy", "Entropy")],
        "Held-out evaluation": [
            ("evaluate/score", "Score on held-out prompts"),
            ("evaluate/kl", "KL on held-out prompts"),
        ],
        "Other metrics": [("my/figure", "my/figure")],
    }
    entropy = found["Responses"][1]
    assert (entropy["steps"], entropy["values"]) == ([1, 2, 3, 4, 5, 6], [1.0, None, 0.75, 0.5, 0.25, 0.125])
    evaluated = found["Held-out evaluation"][0]
    assert (evaluated["steps"], evaluated["values"]) == ([3, 6], [0.75, 1.25])  # the steps between are no gap
    assert all(curve["means"].endswith((".", "?")) for curves in found.values() for curve in curves)
    json.dumps(metric_groups(run), allow_nan=False)
    assert labels(run)["rewards/gold"] == "Score by gold, held out"


def test_every_documented_metric_has_a_description():
    """docs/metrics.md has the definitions; a report describes each metric in a sentence."""
    text = METRICS.read_text().partition("### figures.json")[0]
    rows = re.findall(r"^\| ((?:`[a-z]+/[\w<>]+(?:/NAME)?`,? ?)+) ?\|", text, re.MULTILINE)
    documented = {key.replace("NAME", "any") for row in rows for key in re.findall(r"`([^`]+)`", row)}
    assert {"objective/kl", "reward/eval_loss", "rewards/any", "evaluate/kl", "critic/grad_norm"} <= documented
    patterns = [re.escape(known.figure).replace(r"\*", ".+") for group in catalogue().values() for known in group]
    unknown = {key for key in documented if not any(re.fullmatch(pattern, key) for pattern in patterns)}
    assert unknown == {"progress/responses"}


# ---- comparisons -----------------------------------------------------------------------------------------------------


def test_settings_differences_are_complete(tmp_path: Path):
    first = read_run(write_run(tmp_path / "a"))
    changed = settings(output="elsewhere", algorithm__kl_coef=0.2, rewards=[{"model": "other/model"}])
    second = read_run(write_run(tmp_path / "b", changed))
    assert settings_differences([first, first]) == []
    found = {row["name"]: row["values"] for row in settings_differences([first, second])}
    assert {name: found[name] for name in ("rewards.0.model", "rewards.1.weight", "algorithm.kl_coef")} == {
        "rewards.0.model": ["judge/model", "other/model"],
        "rewards.1.weight": [0.0, None],
        "algorithm.kl_coef": [0.05, 0.2],
    }
    assert not [name for name in found if not name.startswith(("rewards.", "algorithm.kl_coef"))]


def test_own_settings_are_those_that_were_given(tmp_path: Path):
    given = settings(algorithm__name="grpo", algorithm__kl_coef=0.2, rollout__temperature=0.5)
    found = non_default_settings(read_run(write_run(tmp_path / "run", given)))
    assert {row["name"]: row["value"] for row in found if row["needed"]} == {
        "policy.model": "base",
        "prompts.path": "prompts.jsonl",
        "rewards.0.model": "judge/model",
        "rewards.1.function": "judge.py:gold",
    }
    others = {row["name"]: (row["value"], row["default"]) for row in found if not row["needed"]}
    assert others.pop("steps")[0] == 6
    assert others == {
        "rewards.1.weight": (0.0, 1.0),
        "algorithm.kl_coef": (0.2, 0.05),
        "rollout.temperature": (0.5, 1.0),
    }


def test_settings_of_another_program_have_no_defaults(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run", {"steps": 6, "rollout": {"kind": "strange"}}))
    assert non_default_settings(run) == []
    assert reproduction(run)["command"].startswith("keel train ")


def test_the_frontier_has_the_means_of_a_tenth_of_the_run(tmp_path: Path):
    """At least three steps: 0, (0 + 1) / 2, (0 + 1 + 2) / 3, (1 + 2 + 4) / 3, and so on."""
    found = reward_kl_frontier(read_run(write_run(tmp_path / "run")))
    assert found["steps"] == [1, 2, 3, 4, 5, 6]
    assert found["kl"] == [0.0, 0.5, 1.0, 2.33333, 4.0, 6.33333]
    assert found["score"] == [0.0, 0.25, 0.5, 0.916667, 1.25, 1.41667]
    assert [(points["figure"], points["steps"]) for points in found["others"]] == [
        ("rewards/gold", [1, 2, 3, 4, 5, 6]),
        ("evaluate/score", [3, 6]),
    ]
    assert found["others"][1]["kl"] == [2.0, 9.0]  # as measured


def test_a_run_without_a_reference_has_no_frontier(tmp_path: Path):
    columns = {name: values for name, values in COLUMNS.items() if not name.endswith("/kl")}
    run = read_run(write_run(tmp_path / "run", columns=columns))
    assert (reward_kl_frontier(run)["steps"], reward_kl_frontier(run)["others"], panels([run], ["run"])) == ([], [], [])


def test_a_peak_of_a_held_out_score_is_reported(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run"))
    score, gold, evaluated = panels([run], ["run"])
    assert (score["learned"], score["says"], score["runs"][0]["peak"]) == (True, [], None)
    assert (gold["learned"], gold["runs"][0]["peak"]) == (False, 3)
    assert gold["says"] == [
        "The score by the held-out gold was highest, 1.67, at 2.33 nats (step 4) and has fallen to \N{MINUS SIGN}2, "
        "while the score learned from went from 0.917 to 1.42."
    ]
    assert evaluated["runs"][0]["peak"] is None
    assert panels([run, run], ["a", "b"])[1]["says"][1].startswith("b: the score by the held-out gold was highest")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("", "", []),
        ("same words.", "same words.", [("same", "same words.")]),
        ("", "new", [("added", "new")]),
        ("old", "", [("removed", "old")]),
        ("a b c d", "a b x d", [("same", "a b"), ("removed", " c"), ("added", " x"), ("same", " d")]),
        ("i see order 1. bye.", "i see order 2. bye.", [
            ("same", "i see order"), ("removed", " 1"), ("added", " 2"), ("same", ". bye.")]),
        ("one the two", "three the four", [("removed", "one the two"), ("added", "three the four")]),
        ("a\nb  c", "a\nb c", [("same", "a\nb c")]),
        ("ends \n", "ends", [("same", "ends"), ("removed", " \n")]),
    ],
)  # fmt: skip
def test_word_differences_are_marked(before: str, after: str, expected: list[tuple[str, str]]):
    assert word_differences(before, after) == expected


def test_word_differences_of_a_collapsed_response_are_fast():
    """Two thousand equal words against as many others: a table of all pairs would have four million entries."""
    found = word_differences("the " * 2_000, "the a " * 1_000)
    assert "".join(text for kind, text in found if kind != "removed") == "the a " * 1_000


# ---- figures in words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (-2.345, "\N{MINUS SIGN}2.35"), (0.03, "0.0300"), (20.39, "20.4"), (1234.5, "1,234"),
     (1e-7, "1.00e\N{MINUS SIGN}07"), (2.5e9, "2.50e+09"), (float("nan"), "none"), (None, "none")],
)  # fmt: skip
def test_metrics_are_shown_with_three_digits(value: float | None, text: str):
    assert format_value(value) == text


def test_the_main_metrics_go_from_the_first_steps_to_the_last(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run"))
    assert ends(run, "objective/scores") == (0.25, 1.5)  # a third of six steps
    found = {tile["figure"]: (tile["first"], tile["last"]) for tile in tiles(run)}
    assert found == {
        "objective/scores": ("0.250", "1.50"),
        "rewards/gold": ("0.500", "\N{MINUS SIGN}4"),
        "evaluate/score": ("0.750", "1.25"),
        "objective/kl": ("0.500", "7.50"),
        "response/length": ("20", "11"),
        "policy/entropy": ("1", "0.125"),
    }


def test_a_small_plot_breaks_where_nothing_was_measured(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run"))
    plot = small_plot(run, "policy/entropy")
    assert plot is not None
    assert plot["path"].startswith("M0.0 3.0 h0 M80.0 ")  # a dot, then a line from step 3
    assert (plot["low"], plot["high"], plot["steps"]) == ("0.125", "1", (1, 6))
    assert small_plot(run, "no/figure") is None
