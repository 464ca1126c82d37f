"""What is said to follow from what, and since when."""

from typing import Any

import numpy as np
import pytest

from keel.diagnosis.doctor import diagnose, order_findings
from keel.diagnosis.findings import Finding
from keel.diagnosis.rules import POLICY_LEARNING

from .runs import healthy, run_of, settings


@pytest.mark.parametrize(
    ("severity", "step", "cause"),
    [("critical", 12, "reward-shift"), ("warning", 12, None), ("warning", 10, "reward-shift"), ("warning", 11, None)],
)
def test_what_is_milder_and_came_clearly_later_explains_nothing(severity: Any, step: int, cause: str | None):
    """Of two in 40 steps, the hacking in step 7 and then the shift, which lies upstream."""
    shift = Finding("reward-shift", "", severity, "reward model", step, None, (), ())
    hacking = Finding("reward-hacking", "", "critical", "reward model", 7, None, (), ())
    found = order_findings([shift, hacking], POLICY_LEARNING, run_of(healthy(0), settings()))
    assert {finding.name: finding.follows_from for finding in found}["reward-hacking"] == cause


@pytest.mark.parametrize(("coefficient", "first"), [(1.0, "entropy-runaway"), (0.001, "updates-too-large")])
def test_a_bonus_that_outweighs_the_score_is_the_cause_of_its_large_updates(coefficient: float, first: str):
    """Noise within three steps, the first of which is the largest."""
    columns = healthy(0)
    columns["policy/entropy"] = np.minimum(0.55 + 1.2 * np.arange(40), 5.0)
    columns["policy/step_kl"] = np.where(np.arange(40) < 8, 1.6, 0.01)
    columns["policy/entropy"][30:] = 0.55  # also when it has come back
    found = diagnose(run_of(columns, settings(algorithm__entropy_coef=coefficient))).findings
    assert found[0].name == first
    assert {finding.name for finding in found} >= {"entropy-runaway", "updates-too-large"}


@pytest.mark.parametrize(("before", "paid_alike_from", "since"), [(1.0, 0, 1), (1.0, 9, 13), (np.nan, 9, 10)])
def test_answers_never_paid_apart_are_so_since_the_first_step(before: float, paid_alike_from: int, since: int):
    """With 64 answers a step it takes four steps to know."""
    columns = healthy(0)
    for name in ("objective/shaped_scores_std", "objective/scores_std"):
        columns[name] = np.where(np.arange(40) < paid_alike_from, before * columns[name], 0.0)
    said = {finding.name: finding.first_step for finding in diagnose(run_of(columns, settings())).findings}
    assert said["no-signal"] == since


@pytest.mark.parametrize(("batch", "is_noise"), [(4, False), (64, True)])
def test_one_step_of_few_answers_is_no_start_of_the_entropy(batch: int, is_noise: bool):
    columns = healthy(0)
    columns["policy/entropy"] = np.where(np.arange(40) < 1, 0.25, 0.7)
    given = settings(rollout__batch_size=batch, algorithm__entropy_coef=0.01)
    found = {finding.name for finding in diagnose(run_of(columns, given)).findings}
    assert ("entropy-runaway" in found) == is_noise


def test_answers_that_suddenly_are_all_the_same_are_paid_alike_because_of_it():
    columns, late = healthy(0), np.arange(40) >= 20
    for name in ("objective/shaped_scores_std", "objective/scores_std", "policy/entropy"):
        columns[name] = np.where(late, 0.0, columns[name])
    columns["response/distinct"] = np.where(late, 1 / 64, 1.0)
    found = diagnose(run_of(columns, settings())).findings
    assert found[0].name == "policy-collapse"
    assert {finding.name: finding.follows_from for finding in found}["no-signal"] == "policy-collapse"


@pytest.mark.parametrize(("ends", "runaway"), [(5, 9), (15, 7)])
def test_a_kl_that_runs_away_and_answers_without_end_explain_each_other_in_the_order_of_time(ends: int, runaway: int):
    steps = {"missing-ends": ends, "kl-runaway": runaway}
    two = [Finding(name, "", "critical", "policy", step, None, (), ()) for name, step in steps.items()]
    found = order_findings(two, POLICY_LEARNING, run_of(healthy(0), settings()))
    first, second = sorted(steps, key=lambda name: steps[name])
    assert [(finding.name, finding.follows_from) for finding in found] == [(first, None), (second, first)]


def test_of_a_circle_of_causes_the_first_stands_alone():
    """The answers are paid alike since they are alike, which came of the critic; that it lags could come of the pay."""
    steps = {"critic-lagging": 5, "policy-collapse": 12, "no-signal": 13}
    circle = [Finding(name, "", "critical", "policy", step, None, (), ()) for name, step in steps.items()]
    found = order_findings(circle, POLICY_LEARNING, run_of(healthy(0), settings()))
    assert [(finding.name, finding.follows_from) for finding in found] == [
        ("critic-lagging", None),
        ("no-signal", "policy-collapse"),
        ("policy-collapse", "critic-lagging"),
    ]


@pytest.mark.parametrize(("pace", "said_from"), [(-20.0, 8), (0.0, 8), (4.0, 8), (10.0, None), (20.0, None)])
def test_a_critic_far_from_the_scores_is_seen_early_if_it_will_not_come_there(pace: float, said_from: int | None):
    """Scores around 500, their deviation 100; the mean value rises by `pace` a step. At 10 it has 430 to go after eight
    steps, of which it comes 320; at 4 it comes 128 of 472."""
    columns = healthy(0, scale=100.0)
    for name in ("objective/scores", "objective/shaped_scores", "critic/returns"):
        columns[name] = columns[name] + 500
    columns["critic/values"] = np.minimum(pace * np.arange(40), columns["critic/returns"])
    columns["critic/explained_variance"] = 0.6 + 0 * columns["critic/values"]
    run = run_of(columns, settings(algorithm__kl_coef=5.0)).until(11)
    found = {finding.name: finding for finding in diagnose(run).findings}
    assert ("critic-lagging" in found) == (said_from is not None)
    if said_from is not None:
        assert found["critic-lagging"].first_step == said_from
        assert found["critic-lagging"].causes[0].change.setting == "reward.normalize"
