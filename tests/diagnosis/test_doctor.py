"""The doctor on synthetic runs: each fault is the first finding, and a healthy run of any scale has none."""

from typing import Any

import numpy as np
import pytest

from keel.diagnosis.doctor import diagnose
from keel.diagnosis.rules import POLICY_LEARNING
from keel.run.read.run import State

from .runs import Fault, Lines, healthy, run_of, settings


def late(columns: Lines, start: int = 10) -> Any:
    """Return 0 up to step `start`, then a rise to 1 at the end."""
    count = len(columns["objective/scores"])
    return np.clip((np.arange(count) - start) / (count - start), 0, 1)


def change(**new: Any) -> Fault:
    """Return a fault that replaces metrics: `objective__scores=lambda c: ...`."""

    def fault(columns: Lines) -> None:
        for name, value in new.items():
            figure = name.replace("__", "/")
            old = columns.get(figure)
            columns[figure] = value(columns) if callable(value) else np.full_like(columns["objective/scores"], value)
            assert old is None or len(old) == len(columns[figure])

    return fault


def jump(columns: Lines) -> None:
    for name in ("objective/scores", "objective/scores_low", "objective/scores_median", "objective/scores_high",
                 "objective/scores_std", "objective/shaped_scores_std"):  # fmt: skip
        columns[name][15:] *= 8


def drift(columns: Lines) -> None:
    for name in ("objective/scores", "objective/scores_low", "objective/scores_median", "objective/scores_high"):
        columns[name] = columns[name] + 0.4 * np.arange(len(columns[name]))


def judge_falls(columns: Lines) -> None:
    columns["rewards/judge"] = columns["rewards/judge"] - 3 * late(columns)


def longer(columns: Lines) -> None:
    columns["response/length"] = 22 + 12 * late(columns, 2)
    columns["response/length_correlation"] = 0.8 - 0.3 * late(columns, 2)


FAULTS: dict[str, tuple[Fault, dict[str, Any]]] = {
    "prompts-repeated": (change(prompts__distinct=1 / 64), {}),
    "no-signal": (change(objective__shaped_scores_std=0.0, objective__scores_std=0.0), {}),
    "reward-failures": (change(reward__dropped=0.3), {}),
    "reward-inverted": (change(agreement__judge=-0.7), {}),
    "stale-normaliser": (
        change(objective__shaped_scores=-40.0, objective__shaped_scores_std=12.0),
        {"reward__normalize": "reference"},
    ),
    "reward-shift": (jump, {}),
    "sampler-mismatch": (change(sampler__approx_kl=0.04), {}),
    "wrong-reference": (change(objective__kl=lambda c: c["objective/kl"] + 3.0), {}),
    "learning-rate-schedule": (change(policy__learning_rate=1e-9), {"optim__warmup_steps": 10**6}),
    "updates-too-large": (change(policy__step_kl=0.8, policy__approx_kl=0.6, policy__clipfrac=0.5), {}),
    "updates-too-small": (change(policy__step_kl=1e-9), {}),
    "updates-skipped": (change(update__skipped=0.6), {}),
    "value-offset": (
        change(
            critic__returns=lambda c: c["critic/returns"] + 20.0,
            critic__values=lambda c: 0.1 * np.arange(len(c["critic/values"])),
            critic__advantages_std=lambda c: 1.01 * c["critic/returns_std"],
        ),
        {},
    ),
    "critic-not-learning": (change(critic__explained_variance=0.0, critic__values=0.0), {}),
    "critic-lagging": (change(critic__values=lambda c: c["critic/returns"] - 2.5 * c["critic/returns_std"]), {}),
    "advantages-exploding": (
        change(
            critic__advantages_std=lambda c: c["critic/advantages_std"] * (1 + 60 * late(c)),
            critic__returns_std=lambda c: c["critic/returns_std"] * (1 + 60 * late(c)),
        ),
        {},
    ),
    "credit-does-not-reach": (
        change(credit__early=0.02, response__length=lambda c: c["response/length"] * 20),
        {"rollout__max_response_tokens": 1000},
    ),
    "kl-too-tight": (change(objective__kl_coef=30.0), {"algorithm__kl_coef": 30.0}),
    "kl-runaway": (
        change(
            objective__kl=lambda c: 60 * late(c, 3) ** 2,
            objective__scores=lambda c: 0 * c["objective/scores"],
            objective__non_score_reward=0.0,
        ),
        {},
    ),
    "entropy-runaway": (change(policy__entropy=lambda c: 0.55 + 3 * late(c, 5)), {"algorithm__entropy_coef": 1.0}),
    "policy-collapse": (
        change(
            policy__entropy=lambda c: 0.55 * (1 - late(c, 2)) ** 4, response__distinct=lambda c: 1 - 0.9 * late(c, 2)
        ),
        {},
    ),
    "missing-ends": (change(response__truncated=lambda c: late(c)), {}),
    "length-exploitation": (longer, {}),
    "reward-hacking": (judge_falls, {}),
    "reward-out-of-range": (change(outside_range__reward=lambda c: 0.9 * late(c)), {}),
    "instability": (change(objective__scores=lambda c: c["objective/scores"] - 2.5 * late(c, 20)), {}),
    "not-learning": (change(objective__scores=lambda c: c["objective/scores"] * 0 + 0.1 * np.sin(np.arange(40))), {}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_the_first_finding(name: str, seed: int):
    fault, given = FAULTS[name]
    columns = healthy(seed)
    fault(columns)
    diagnosis = diagnose(run_of(columns, settings(**given)))
    assert diagnosis.findings[0].name == name, [finding.name for finding in diagnosis.findings]
    assert diagnosis.verdict != "healthy"
    assert diagnosis.findings[0].evidence
    assert diagnosis.findings[0].causes


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("steps", "length"), [(20, 22.0), (40, 200.0), (400, 22.0)])
def test_a_healthy_run_of_any_scale_has_no_findings(scale: float, steps: int, length: float):
    for seed in range(4):
        given = settings(steps, algorithm__kl_coef=0.05 * scale)
        diagnosis = diagnose(run_of(healthy(seed, steps, scale, length), given))
        assert [finding.name for finding in diagnosis.findings] == []
        assert diagnosis.verdict == "healthy"


@pytest.mark.parametrize(
    "rule", [rule for rule in POLICY_LEARNING if rule.name != "run-ended"], ids=lambda rule: rule.name
)
def test_no_rule_uses_later_steps(rule: Any):
    """The level of a step is the same when the run has continued."""
    for name, (fault, given) in FAULTS.items():
        columns = healthy(0)
        fault(columns)
        run = run_of(columns, settings(**given))
        all_levels = rule.levels(run)
        for step in (1, 2, 5, 11, 20, 33):
            assert rule.levels(run.until(step)).tolist() == all_levels[:step].tolist(), f"{rule.name} on {name}"


def test_a_finding_opens_and_closes():
    columns = healthy(0)
    columns["policy/clipfrac"][10:18] = 0.9
    (finding,) = diagnose(run_of(columns, settings())).findings
    assert (finding.name, finding.severity, finding.is_open) == ("updates-too-large", "critical", False)
    assert 11 <= finding.first_step <= 14
    assert 18 <= finding.last_step <= 21


def test_a_finding_comes_after_its_cause():
    columns = healthy(0)
    FAULTS["updates-too-large"][0](columns)
    FAULTS["policy-collapse"][0](columns)
    found = diagnose(run_of(columns, settings())).findings
    assert found[0].name == "updates-too-large"
    assert {finding.name: finding.follows_from for finding in found}["policy-collapse"] == "updates-too-large"


def test_of_two_possible_causes_of_each_other_the_earlier_one_is_first():
    columns = healthy(0)
    FAULTS["updates-too-large"][0](columns)
    columns["objective/shaped_scores_std"][6:] = 0.0
    found = diagnose(run_of(columns, settings())).findings
    assert [finding.name for finding in found][:1] == ["updates-too-large"]
    assert {finding.name: finding.follows_from for finding in found}["no-signal"] == "updates-too-large"


def test_missing_metrics_are_no_findings():
    columns = healthy(0)
    few = {name: columns[name] for name in ("objective/scores", "objective/scores_std", "response/length")}
    assert diagnose(run_of(few, settings())).findings == ()


def test_an_empty_run_is_neither_healthy_nor_faulty():
    run = run_of({name: values[:0] for name, values in healthy(0).items()}, settings())
    assert diagnose(run).verdict == "unknown"


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (State("failed", "RewardError: http://x: refused"), "reward-failures"),
        (State("failed", "Diverged: the loss is nan"), "updates-skipped"),
        (State("failed", "OSError: no space left on device"), "run-ended"),
        (State("died", "process 7 is gone and left no message"), "run-ended"),
    ],
)
def test_a_run_that_ended_badly_has_a_finding(state: State, name: str):
    diagnosis = diagnose(run_of(healthy(0), settings(), state))
    assert diagnosis.findings[0].name == name


@pytest.mark.parametrize("standing", ["finished", "running", "stopped", "unknown"])
def test_a_run_that_ended_well_has_no_findings(standing: Any):
    assert diagnose(run_of(healthy(0), settings(), State(standing))).findings == ()


def test_every_explaining_rule_exists():
    names = {rule.name for rule in POLICY_LEARNING}
    assert len(names) == len(POLICY_LEARNING)
    assert {cause for rule in POLICY_LEARNING for cause in rule.follows} <= names


@pytest.mark.parametrize("name", FAULTS)
def test_every_finding_has_evidence_a_cause_and_a_change_at_any_step(name: str):
    """Also when the rule no longer holds and the finding is still open."""
    fault, given = FAULTS[name]
    columns, well = healthy(0), healthy(0)
    fault(columns)
    for figure, values in columns.items():
        if figure in well:
            values[25:] = well[figure][25:]
    run = run_of(columns, settings(**given))
    for step in range(1, 41):
        for finding in diagnose(run.until(step)).findings:
            assert finding.evidence, f"{finding.name} in step {step}"
            assert finding.causes, f"{finding.name} in step {step}"
            assert all(cause.what and cause.change.to for cause in finding.causes)


@pytest.mark.parametrize(("standing", "severity"), [("failed", "critical"), ("died", "notice")])
def test_a_run_that_ended_before_its_first_step_reports_the_error(standing: Any, severity: str):
    run = run_of({name: values[:0] for name, values in healthy(0).items()}, settings(), State(standing, "the words"))
    (finding,) = diagnose(run).findings
    assert (finding.name, finding.severity) == ("run-ended", severity)
    assert finding.causes[0].speaks_for == ("the words",)


def test_the_error_of_one_failure_is_no_evidence_of_another():
    columns = healthy(0)
    columns["reward/dropped"] = np.full(40, 0.3)
    found = diagnose(run_of(columns, settings(), State("failed", "Diverged: the loss is nan"))).findings
    lost = next(finding for finding in found if finding.name == "reward-failures")
    assert not any("the loss is nan" in evidence.says for evidence in lost.evidence)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_kl_coef_is_proposed_in_the_scale_of_the_scores(scale: float):
    """Scores deviate by 1.27 of the scale at first. Where kl_coef is 0, a twentieth of that is proposed."""
    columns = healthy(0, scale=scale)
    columns["objective/kl_coef"] = np.zeros(40)
    columns["rewards/judge"] = columns["rewards/judge"] - 3 * late(columns)
    finding = diagnose(run_of(columns, settings(algorithm__kl_coef=0.0))).findings[0]
    change = next(cause.change for cause in finding.causes if cause.change.setting == "algorithm.kl_coef")
    number = float(change.to.split()[0])
    assert (finding.name, number) == ("reward-hacking", pytest.approx(0.05 * 1.2 * scale, rel=0.1))


@pytest.mark.parametrize(("left", "is_shift"), [(1.0, True), (0.1, False)])
def test_a_scorer_at_its_maximum_is_no_evidence_of_a_drift(left: float, is_shift: bool):
    """All scores rise by 0.4 per step, at a KL that could explain it. The judge keeps `left` of its deviation and rises
    by a tenth."""
    columns = healthy(0)
    drift(columns)
    columns["objective/kl"] = columns["objective/kl"] * 30
    columns["spread/judge"] = columns["spread/judge"] * (1 - (1 - left) * np.minimum(1, 5 * late(columns, 2)))
    found = {finding.name for finding in diagnose(run_of(columns, settings())).findings}
    assert ("reward-shift" in found) == is_shift


def test_a_negative_weight_alone_is_no_fault():
    """It is right for a scorer that counts mistakes."""
    given = settings(rewards=[{"function": "mistakes.py:count", "weight": -1.0}])
    columns = {name: values for name, values in healthy(0).items() if "judge" not in name}
    assert diagnose(run_of(columns, given)).findings == ()


def narrowed(columns: Lines, spread: float) -> None:
    """Let the agreement of score and judge end, while the scores keep this share of their deviation.

    The score rises too little for the judge to be expected to rise too.
    """
    initial = columns["objective/scores_std"][:4].mean()
    columns["objective/scores"] = 0.35 * columns["objective/scores"]
    columns["agreement/judge"] = 0.7 - 0.8 * late(columns, 2)
    columns["rewards/judge"] = 0.0 * columns["rewards/judge"]
    for figure in ("objective/scores_std", "spread/judge"):
        columns[figure] = np.full(40, initial) * (1 - (1 - spread) * late(columns, 2))


@pytest.mark.parametrize(("spread", "expected"), [(1.0, ["reward-hacking"]), (0.3, [])])
def test_lost_agreement_counts_only_where_responses_still_differ(spread: float, expected: list[str]):
    """Among responses that are all alike the order is chance."""
    columns = healthy(0)
    narrowed(columns, spread)
    assert [finding.name for finding in diagnose(run_of(columns, settings())).findings] == expected


@pytest.mark.parametrize(
    ("judge", "spread", "expected"),
    [
        (0.1, 1.2, ["reward-hacking"]),  # no better than at the start: the score rewards something else
        (0.6, 1.2, []),  # half of the rise that the first responses predict: the scorers are not identical
        (0.1, 0.3, []),  # a judge at its maximum, which no longer distinguishes these responses
    ],
)
def test_scorers_that_agree_rise_together(judge: float, spread: float, expected: list[str]):
    """The score rises by 1.3 of its deviation, the judge by `judge` of its; their initial agreement is 0.7."""
    columns = healthy(0)
    learned = 1 - np.exp(-4 * np.linspace(0, 1, 40))
    columns["rewards/judge"] = 1.2 * judge * learned + 0.1 * np.random.default_rng(0).standard_normal(40)
    columns["spread/judge"] = 1.2 + (spread - 1.2) * learned
    assert [finding.name for finding in diagnose(run_of(columns, settings())).findings] == expected


def test_scorers_of_a_kind_have_one_vote_together():
    columns = healthy(0)
    narrowed(columns, 1.0)
    columns |= {name.replace("judge", "other"): values for name, values in columns.items() if "judge" in name}
    given = settings()
    given["rewards"].append({"function": "other.py:other", "weight": 0.0})
    assert [finding.severity for finding in diagnose(run_of(columns, given)).findings] == ["warning"]


def test_memorised_prompts_are_reported_only_beyond_chance():
    """A gap of one deviation is significant with 64 prompts and not with 4."""
    columns = healthy(0)
    held_out = columns["objective/scores"] - 1.3 * (np.arange(40) >= 20)
    columns["evaluate/score"] = np.where(np.arange(40) % 10 == 9, held_out, np.nan)
    for batch, expected in ((64, ["prompts-memorised"]), (4, [])):
        given = settings(rollout__batch_size=batch, algorithm__minibatch_size=4)
        assert [finding.name for finding in diagnose(run_of(columns, given)).findings] == expected


def supervised_run(held_out: list[float], state: State | None = None, **given: Any) -> Any:
    columns = {"reward/loss": np.linspace(0.7, 0.3, len(held_out)), "reward/eval_loss": held_out}
    return run_of(columns, {"epochs": 3, **given}, state)


def still_run(loss: float, drift: float = 0.0, **given: Any) -> Any:
    """Return twenty steps of a noisy loss, with a held-out loss that is 0.3% higher at the end."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(20)
    held_out = [loss, *[np.nan] * 9, 0.9995 * loss, *[np.nan] * 8, 1.003 * loss]
    columns = {"sft/loss": loss + noise + np.linspace(0, drift, 20), "sft/eval_loss": held_out}
    return run_of(columns, {"epochs": 2, **given}, State("finished"))


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"dtype": "bfloat16", "optim": {"learning_rate": 1e-5}}, "the learning rate"),
        ({"optim": {"learning_rate": 1e-8}}, "the learning rate"),
    ],
)
def test_a_run_in_which_nothing_moved_is_not_overfitted(given: dict[str, Any], cause: str):
    found = diagnose(still_run(2.3, **given)).findings
    assert [each.name for each in found] == ["nothing-moved"]
    assert found[0].causes[0].what.startswith(cause)


def test_a_run_whose_loss_falls_while_the_held_out_one_rises_is():
    assert [each.name for each in diagnose(still_run(2.3, drift=-0.8)).findings] == ["overfitted"]


def test_a_run_that_keeps_its_best_weights_is_not_overfitted():
    rising = [0.7, 0.6, 0.5, 0.6, 0.7]
    assert [each.name for each in diagnose(supervised_run(rising)).findings] == ["overfitted"]
    assert diagnose(supervised_run(rising, patience=1)).findings == ()


@pytest.mark.parametrize(
    ("what", "name"), [("Diverged: the loss is nan", "updates-skipped"), ("OSError: disk full", "run-ended")]
)
def test_a_supervised_run_reports_the_error_that_ended_it(what: str, name: str):
    found = diagnose(supervised_run([0.7, 0.6], State("failed", what))).findings
    assert found[0].name == name
    assert any(what in evidence.says for each in found for evidence in each.evidence) or found[0].causes[
        0
    ].speaks_for == (what,)
