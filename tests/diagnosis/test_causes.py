"""Which finding explains which, and when each one starts."""

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
def test_a_milder_and_clearly_later_finding_explains_nothing(severity: Any, step: int, cause: str | None):
    """In 40 steps: the hacking starts in step 7, and the shift, which is upstream, at `step`."""
    shift = Finding("reward-shift", "", severity, "reward model", step, None, (), ())
    hacking = Finding("reward-hacking", "", "critical", "reward model", 7, None, (), ())
    found = order_findings([shift, hacking], POLICY_LEARNING, run_of(healthy(0), settings()))
    assert {finding.name: finding.follows_from for finding in found}["reward-hacking"] == cause


@pytest.mark.parametrize(("coefficient", "first"), [(1.0, "entropy-runaway"), (0.001, "updates-too-large")])
def test_a_bonus_that_outweighs_the_score_is_the_cause_of_its_large_updates(coefficient: float, first: str):
    """The entropy rises within three steps, and the first updates are the largest."""
    columns = healthy(0)
    columns["policy/entropy"] = np.minimum(0.55 + 1.2 * np.arange(40), 5.0)
    columns["policy/step_kl"] = np.where(np.arange(40) < 8, 1.6, 0.01)
    columns["policy/entropy"][30:] = 0.55  # also once the entropy is back at its start
    found = diagnose(run_of(columns, settings(algorithm__entropy_coef=coefficient))).findings
    assert found[0].name == first
    assert {finding.name for finding in found} >= {"entropy-runaway", "updates-too-large"}


@pytest.mark.parametrize(("factor", "equal_from", "since"), [(1.0, 0, 1), (1.0, 9, 13), (np.nan, 9, 10)])
def test_scores_that_never_differed_are_a_finding_from_step_1(factor: float, equal_from: int, since: int):
    """With 64 responses in a step the rule needs four steps."""
    columns = healthy(0)
    for name in ("objective/shaped_scores_std", "objective/scores_std"):
        columns[name] = np.where(np.arange(40) < equal_from, factor * columns[name], 0.0)
    first_steps = {finding.name: finding.first_step for finding in diagnose(run_of(columns, settings())).findings}
    assert first_steps["no-signal"] == since


@pytest.mark.parametrize(("batch", "is_noise"), [(4, False), (64, True)])
def test_a_step_of_few_responses_is_not_the_initial_entropy(batch: int, is_noise: bool):
    columns = healthy(0)
    columns["policy/entropy"] = np.where(np.arange(40) < 1, 0.25, 0.7)
    given = settings(rollout__batch_size=batch, algorithm__entropy_coef=0.01)
    found = {finding.name for finding in diagnose(run_of(columns, given)).findings}
    assert ("entropy-runaway" in found) == is_noise


def test_a_collapse_explains_equal_scores():
    columns, late = healthy(0), np.arange(40) >= 20
    for name in ("objective/shaped_scores_std", "objective/scores_std", "policy/entropy"):
        columns[name] = np.where(late, 0.0, columns[name])
    columns["response/distinct"] = np.where(late, 1 / 64, 1.0)
    found = diagnose(run_of(columns, settings())).findings
    assert found[0].name == "policy-collapse"
    assert {finding.name: finding.follows_from for finding in found}["no-signal"] == "policy-collapse"


@pytest.mark.parametrize(("ends", "runaway"), [(5, 9), (15, 7)])
def test_of_a_kl_runaway_and_missing_ends_the_earlier_one_is_the_cause(ends: int, runaway: int):
    steps = {"missing-ends": ends, "kl-runaway": runaway}
    two = [Finding(name, "", "critical", "policy", step, None, (), ()) for name, step in steps.items()]
    found = order_findings(two, POLICY_LEARNING, run_of(healthy(0), settings()))
    first, second = sorted(steps, key=lambda name: steps[name])
    assert [(finding.name, finding.follows_from) for finding in found] == [(first, None), (second, first)]


def test_the_earliest_finding_of_a_cycle_is_the_root_cause():
    """Equal scores follow from a collapse, which follows from the critic, whose lag could follow from equal scores."""
    steps = {"critic-lagging": 5, "policy-collapse": 12, "no-signal": 13}
    circle = [Finding(name, "", "critical", "policy", step, None, (), ()) for name, step in steps.items()]
    found = order_findings(circle, POLICY_LEARNING, run_of(healthy(0), settings()))
    assert [(finding.name, finding.follows_from) for finding in found] == [
        ("critic-lagging", None),
        ("no-signal", "policy-collapse"),
        ("policy-collapse", "critic-lagging"),
    ]


@pytest.mark.parametrize(("pace", "reported_from"), [(-20.0, 8), (0.0, 8), (4.0, 8), (10.0, None), (20.0, None)])
def test_a_critic_that_will_not_reach_the_returns_is_reported_early(pace: float, reported_from: int | None):
    """Scores around 500 with a deviation of 100; the mean value rises by `pace` per step.

    At 10 it covers 320 of the 430 that remain after eight steps, at 4 only 128 of 472.
    """
    columns = healthy(0, scale=100.0)
    for name in ("objective/scores", "objective/shaped_scores", "critic/returns"):
        columns[name] = columns[name] + 500
    columns["critic/values"] = np.minimum(pace * np.arange(40), columns["critic/returns"])
    columns["critic/explained_variance"] = 0.6 + 0 * columns["critic/values"]
    run = run_of(columns, settings(algorithm__kl_coef=5.0)).until(11)
    found = {finding.name: finding for finding in diagnose(run).findings}
    assert ("critic-lagging" in found) == (reported_from is not None)
    if reported_from is not None:
        assert found["critic-lagging"].first_step == reported_from
        assert found["critic-lagging"].causes[0].change.setting == "reward.normalize"
