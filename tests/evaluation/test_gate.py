"""The release gate: read strictly, judged strictly; what was not measured never passes."""

from pathlib import Path
from typing import Any

import pytest

from keel.errors import ConfigError
from keel.evaluation.gate import check_demands, find_slice, gate_verdict, read_gate

FIGURES: dict[str, Any] = {
    "prompts": 120,
    "win_rate": 0.58,
    "win_rate_low": 0.52,
    "win_rate_high": 0.64,
    "policy": {"score": 1.5, "score_low": 1.25, "score_high": 1.75, "kl": float("nan"), "rewards/gold": 2.0},
    "against": {"score": -3.0},
    "people": {"win_rate": 0.7},
    "slices": {
        "topic=refund": {"prompts": 30, "policy": {"score": -0.5, "score_low": -0.75}},
        "topic=a, b": {"prompts": 14, "policy": {"score": 1.0}},
        "tone=refund, curt": {"prompts": 9, "policy": {"score": 1.0}},
    },
}


def verdict(gate: str) -> dict[str, Any]:
    return gate_verdict(read_gate(gate), FIGURES)


@pytest.mark.parametrize(
    "gate",
    [
        "win_rate>=0.58",
        "win_rate >= 0.5, win_rate<=0.6, win_rate>0.57, win_rate<0.59",
        "low(win_rate)>=0.52",
        "high(win_rate)<0.65",
        "rewards/gold>=2",
        "people.win_rate>=0.7",
        "prompts>=100",
        "slice[refund].score>=-0.5",
        "slice[topic=refund].score>=-1e0",
        "low( slice[refund].score ) >= -0.75",
        "slice[a, b].score>=1, score>0",
    ],
)
def test_what_reaches_its_bound_passes(gate: str):
    assert verdict(gate)["passed"] is True
    assert verdict(gate)["failed"] == []


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("win_rate>=0.6", "win_rate 0.58 is not >= 0.6"),
        ("low(win_rate)>=0.55", "low(win_rate) 0.52 is not >= 0.55"),
        ("win_rate<0.58", "win_rate 0.58 is not < 0.58"),
        ("score>=0, slice[refund].score>=0", "slice[refund].score -0.5 is not >= 0"),
        ("low(slice[refund].score)>=-0.7", "low(slice[refund].score) -0.75 is not >= -0.7"),
    ],
)
def test_what_falls_short_is_named_with_figure_and_bound(gate: str, says: str):
    found = verdict(gate)
    assert found["passed"] is False
    assert found["failed"] == [says]


@pytest.mark.parametrize(
    ("gate", "subject"),
    [
        ("kl<=20", "kl"),  # not a number
        ("truncated<=0.05", "truncated"),  # not there
        ("low(rewards/gold)>=0", "low(rewards/gold)"),  # no interval
        ("slice[a, b].win_rate>=0", "slice[a, b].win_rate"),
        ("people.agreement>=-9", "people.agreement"),
    ],
)
def test_what_was_not_measured_never_passes(gate: str, subject: str):
    assert verdict(gate)["failed"] == [f"{subject} was not measured"]


def of_prompts(prompts: int) -> dict[str, Any]:
    own = {"prompts": prompts, "policy": {"score": 1.5, "score_low": 1.25, "score_high": 1.75}}
    return own | {"slices": {"topic=late": own}}


@pytest.mark.parametrize("figure", ["score", "slice[late].score"])
def test_a_figure_takes_ten_prompts_and_of_fewer_than_twenty_it_is_told(figure: str):
    low, high = read_gate(f"low({figure})>=1, high({figure})<=2"), read_gate(f"{figure}>=1, {figure}>=2")
    assert gate_verdict(low, of_prompts(9))["failed"] == [
        f"low({figure}) needs at least 10 prompts, has 9",
        f"high({figure}) needs at least 10 prompts, has 9",
    ]
    assert gate_verdict(high, of_prompts(9))["failed"][0] == f"{figure} needs at least 10 prompts, has 9"
    assert [row["says"] for row in gate_verdict(low, of_prompts(10))["demands"]] == [
        f"low({figure}) 1.25 is >= 1 (of 10 prompts only)",
        f"high({figure}) 1.75 is <= 2 (of 10 prompts only)",
    ]
    assert gate_verdict(low, of_prompts(10))["passed"]
    assert gate_verdict(low, of_prompts(20))["demands"][0]["says"] == f"low({figure}) 1.25 is >= 1"
    rows = gate_verdict(high, of_prompts(10))["demands"]
    assert [(row["passed"], row["says"]) for row in rows] == [
        (True, f"{figure} 1.5 is >= 1 (of 10 prompts only)"),
        (False, f"{figure} 1.5 is not >= 2 (of 10 prompts only)"),
    ]


def test_a_rate_that_is_not_identified_fails_with_the_reason():
    nan = float("nan")
    own = {"length_controlled_win_rate": nan, "length_controlled_win_rate_low": nan, "length_overlap": 0.02}
    figures = {"prompts": 50, **own, "policy": {}}
    gate = read_gate("low(length_controlled_win_rate)>=0.5, win_rate>=0.5")
    assert gate_verdict(gate, figures)["failed"] == [
        "low(length_controlled_win_rate) is not identified: one side is longer in 98.0% of the comparisons",
        "win_rate was not measured",
    ]


def test_what_people_say_counts_the_prompts_that_they_judged():
    people = {"prompts": 3, "win_rate": 0.9, "win_rate_low": 0.8, "win_rate_high": 1.0}
    figures = of_prompts(100) | {"people": people}
    gate = read_gate("low(people.win_rate)>=0.5, people.prompts>=3, low(score)>=1")
    assert [row["says"] for row in gate_verdict(gate, figures)["demands"]] == [
        "low(people.win_rate) needs at least 10 prompts, has 3",
        "people.prompts 3 is >= 3",
        "low(score) 1.25 is >= 1",
    ]


def test_rounding_does_not_make_a_failure_look_like_a_pass():
    figures = {"policy": {"truncated": 0.050000001}}
    assert gate_verdict(read_gate("truncated<=0.05"), figures)["failed"] == ["truncated 0.050000001 is not <= 0.05"]


def test_the_verdict_has_every_demand_with_what_was_measured():
    rows = verdict("win_rate>=0.6, score>=1")["demands"]
    assert rows[0] == {
        "demand": "win_rate>=0.6",
        "measured": 0.58,
        "interval": [0.52, 0.64],
        "passed": False,
        "says": "win_rate 0.58 is not >= 0.6",
    }
    assert rows[1]["passed"] is True


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("win_rate>=high", "'high' in 'win_rate>=high' is not a number"),
        ("win_rate>=nan", "'nan' in 'win_rate>=nan' is not a number"),
        ("win_rate>=inf", "is not a number"),
        ("win_rate=>0.5", "'=>0.5'|cannot read"),
        ("win_rate 0.5, kl<=2", "cannot read 'win_rate 0.5'"),
        ("low(win_rate>=0.5", "cannot read"),
        ("win_rate)>=0.5", "cannot read"),
        ("0.5<=win_rate", "'win_rate' in '0.5<=win_rate' is not a number"),
        ("low(kl)<=20", r"tests the optimistic end of the interval -> write high\(kl\)"),
        ("high(score)>=0", r"write low\(score\)"),
        ("win_rate>=0.5;kl<=2", "is not a number"),
        ("gates.txt", "is neither a demand nor a file"),
        (" , <", "cannot read '<'"),
    ],
)
def test_a_mistake_is_one_clear_line(gate: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        read_gate(gate)
    assert "\n" not in str(caught.value)


def test_a_file_holds_demands_line_by_line(tmp_path: Path):
    path = tmp_path / "gates.txt"
    path.write_text("# of the release board\nwin_rate>=0.5  # more often than not\n\nkl<=20, score>=0\n")
    assert [demand.text for demand in read_gate(str(path))] == ["win_rate>=0.5", "kl<=20", "score>=0"]
    path.write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match="the gate has no demand"):
        read_gate(str(path))


def test_a_recipe_may_hold_the_demands_line_by_line():
    assert [demand.text for demand in read_gate("win_rate>=0.5  # of the board, 2026\nkl<=20\n")] == [
        "win_rate>=0.5",
        "kl<=20",
    ]


NAMES = ["prompts", "win_rate", "score", "rewards/gold"]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("win_rat>=0.5", "no metric is called 'win_rat'; did you mean win_rate"),
        ("rewards/gld>=0", "did you mean rewards/gold"),
        ("zzz>=0", "known: prompts, win_rate, score, rewards/gold"),
        ("low(prompts)>=5", "prompts has no interval"),
        ("slice[refnd].score>=0", r"no prompt is in slice\[refnd\]; did you mean refund"),
        ("slice[yes].score>=0", r"slice\[yes\] may be a=yes or b=yes -> write slice\[a=yes\]"),
    ],
)
def test_names_that_nobody_knows_are_refused_before_anything_is_measured(gate: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_demands(read_gate(gate), NAMES, ["topic=refund", "a=yes", "b=yes"])


def test_a_slice_needs_slices():
    check_demands(read_gate("score>=0"), NAMES, [])
    with pytest.raises(ConfigError, match="there are no slices -> name columns"):
        find_slice("refund", [])
