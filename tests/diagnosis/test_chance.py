"""Effects of chance (few prompts, groups, coarse and sparse scores) are no findings; larger effects are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keel.diagnosis.chance import fall_from_best, mean_error, prompts_per_step, responses_per_step, score_rise
from keel.diagnosis.doctor import diagnose
from keel.run.read.run import Run
from keel.run.read.series import carry_forward, trailing_mean, trailing_median

from .runs import healthy, run_of, settings
from .simulated import TASKS, Shape, Task, passes, simulated

SHAPES = [Shape(4), Shape(8), Shape(64), Shape(256), Shape(32, group=4), Shape(64, group=8), Shape(64, steps=20)]


def loud(run: Run) -> set[str]:
    return {finding.name for finding in diagnose(run).findings if finding.severity != "notice"}


# With few responses, nearly all of which are good, all scores are equal from the first step to the last.
CASES = [(task, shape) for task in TASKS for shape in SHAPES if task != "good, then better" or shape.batch >= 64]


@pytest.mark.parametrize(("task", "shape"), CASES, ids=str)
def test_chance_causes_no_finding_in_a_healthy_run(task: str, shape: Shape):
    # Groups whose responses are nearly all bad, or all good, are a fault of the prompts.
    allowed = {"no-signal"} if task.startswith(("sparse", "good")) and shape.group > 1 else set()
    for seed in range(100, 103):
        run = simulated(TASKS[task], shape, seed)
        for step in (shape.steps // 4, shape.steps // 2, shape.steps):
            assert loud(run.until(step)) <= allowed, f"seed {seed}, step {step}"


def test_responses_and_prompts_of_a_step():
    run = run_of(healthy(), settings(rollout__batch_size=64, rollout__group_size=8))
    assert (responses_per_step(run), prompts_per_step(run)) == (64, 8)


@pytest.mark.parametrize(("alike", "expected"), [(0.0, 0.125), (1.0, 0.3536)])
def test_the_error_of_a_mean_depends_on_the_similarity_within_a_group(alike: float, expected: float):
    """64 responses of deviation 1 in groups of 8: 1 / sqrt(64) if independent, 1 / sqrt(8) if a group is all equal."""
    random = np.random.default_rng(0)
    steps = []
    for _ in range(300):
        of_prompt, of_response = random.standard_normal(8).repeat(8), random.standard_normal(64)
        steps.append(alike**0.5 * of_prompt + (1 - alike) ** 0.5 * of_response)
    columns = {
        "objective/scores": [scores.mean() for scores in steps],
        "objective/scores_std": [scores.std() for scores in steps],
    }
    run = run_of(columns, settings(300, rollout__group_size=8))
    assert mean_error(run, "objective/scores")[-1] == pytest.approx(expected, rel=0.2)


def flat(values: list[float], spread: float = 1.0, batch: int = 100) -> Run:
    """Return a run of 40 planned steps, whose windows have 4."""
    columns = {"objective/scores": values, "objective/scores_std": np.full(len(values), spread)}
    return run_of(columns, settings(40, rollout__batch_size=batch))


def test_a_rise_is_measured_in_deviations_and_in_standard_errors():
    """From 0 to 1 at a deviation of 2 over 100 responses: half a deviation.

    The standard error of 4 steps is 2 / sqrt(400), that of a difference sqrt(2) times as much: 7.07 errors, a little
    less because the deviation is that of a sample.
    """
    gain, errors = score_rise(flat([0.0] * 4 + [1.0] * 36, spread=2.0))
    assert gain[-1] == pytest.approx(0.5)
    assert errors[-1] == pytest.approx(7.07, rel=0.01)
    assert np.isnan(gain[:3]).all()


def test_a_fall_from_the_best_is_corrected_for_luck():
    """The best of ten windows is sqrt(ln 10) = 1.517 errors too high by luck."""
    fall, errors = fall_from_best(flat([0.0] * 10 + [1.0] * 10 + [0.0] * 20))
    assert fall[-1] == pytest.approx(1.0)
    assert errors[-1] == pytest.approx(14.07 - 1.517, abs=0.05)


def test_scores_that_never_differ_neither_rise_nor_fall():
    run = flat([3.0] * 40, spread=0.0)
    assert [float(part[-1]) for part in (*score_rise(run),)] == [0.0, 0.0]


def test_a_solved_task_is_a_notice_and_a_constant_score_is_critical():
    columns = healthy(0)
    for figure in ("objective/scores_std", "objective/shaped_scores_std"):
        columns[figure][25:] = 0.0
    for figure in ("objective/scores", "objective/scores_low", "objective/scores_median", "objective/scores_high"):
        columns[figure][25:] = columns["objective/scores_high"][:25].max()
    found = diagnose(run_of(columns, settings())).findings
    assert [(finding.name, finding.severity) for finding in found] == [("no-signal", "notice")]
    assert found[0].causes[0].what.startswith("the task is solved")

    columns = healthy(0)
    for figure in ("objective/scores_std", "objective/shaped_scores_std"):
        columns[figure] = np.zeros(40)
    columns["objective/scores"] = np.zeros(40)
    first = diagnose(run_of(columns, settings())).findings[0]
    assert (first.name, first.severity) == ("no-signal", "critical")


SCORES = ["objective/scores", "objective/scores_low", "objective/scores_median", "objective/scores_high"]


def shifted(factor: float = 1.0, offset: float = 0.0, steps: slice = slice(20, None), **given: int) -> Run:
    columns = healthy(0)
    for figure in SCORES:
        columns[figure] = columns[figure] - 3.0  # so that scaling changes all of them
        columns[figure][steps] = factor * columns[figure][steps] + offset
    for figure in ("objective/scores_std", "objective/shaped_scores_std"):
        columns[figure][steps] *= factor
    columns["policy/step_kl"] = np.full(40, 0.01)
    return run_of(columns, settings(**{f"rollout__{name}": value for name, value in given.items()}))


def shift_of(run: Run) -> int | None:
    """Return the first step of a critical reward-shift."""
    found = [each for each in diagnose(run).findings if each.name == "reward-shift" and each.severity == "critical"]
    return found[0].first_step if found else None


@pytest.mark.parametrize("change", [{"factor": 8.0}, {"factor": 0.1}, {"offset": 6.0}, {"offset": -6.0}], ids=str)
def test_a_jump_of_scale_or_offset_is_reported_with_its_step(change: dict[str, float]):
    assert shift_of(shifted(**change)) == 21


@pytest.mark.parametrize("change", [{"factor": 8.0}, {"offset": 6.0}], ids=str)
def test_a_single_outlier_step_is_no_jump(change: dict[str, float]):
    assert shift_of(shifted(**change, steps=slice(20, 21))) is None


def test_a_change_that_a_large_update_explains_is_no_jump():
    run = shifted(offset=6.0)
    columns = dict(run.columns) | {"policy/step_kl": np.full(40, 0.2)}  # times 20 tokens: 4 nats
    assert shift_of(replace(run, columns=columns)) is None


def test_a_jump_is_not_reported_with_four_responses():
    assert shift_of(shifted(factor=8.0, batch_size=4)) is None


SMOOTH = TASKS["smooth"]


def changed(run: Run, given: dict[str, Any] | None = None, **columns: Any) -> Run:
    """Return the run with other metrics (names with __ for the slash) and other settings by section."""
    metrics = {name.replace("__", "/"): np.asarray(values, dtype=float) for name, values in columns.items()}
    settings = {name: {**run.settings.get(name, {}), **values} for name, values in (given or {}).items()}
    return replace(run, columns={**run.columns, **metrics}, settings={**run.settings, **settings})


def test_a_critic_that_warms_up_is_no_fault_of_the_updates():
    run, frozen = simulated(SMOOTH, Shape(64), 0), np.arange(60) < 15
    still = np.where(frozen, 1e-12, run["policy/step_kl"])
    warm = changed(run, {"critic": {"warmup_steps": 15}}, policy__step_kl=still)
    assert "updates-too-small" in loud(changed(run, policy__step_kl=still).until(15))
    assert loud(warm.until(15)) == loud(warm) == set()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_scores_does_not_matter_with_normalised_advantages(scale: float):
    """kl_coef 0.04 is small in the loss of GRPO at any scale of the scores; in the reward that depends on the scale."""
    run = simulated(Task(lambda quality: scale * quality, 1.5), Shape(64, group=8), 0)
    in_loss = {"algorithm": {"name": "grpo", "kl_in": "loss", "normalize_std": True, "kl_coef": 0.04}}
    coefficient = {"objective__kl_coef": np.full(60, 0.04), "objective__non_score_reward": -0.04 * run["objective/kl"]}
    assert loud(changed(run, in_loss, **coefficient)) == set()
    in_reward = {"algorithm": {"name": "grpo", "kl_in": "reward", "kl_coef": 0.04}}
    assert ("kl-too-tight" in loud(changed(run, in_reward, **coefficient))) == (scale < 1)


def test_harder_prompts_are_not_reward_hacking():
    """From the middle on all scorers are one deviation lower, so they still agree."""
    run, late = simulated(Task(SMOOTH.pay, 2.5), Shape(64), 1), 1.2 * (np.arange(60) >= 30)
    harder = {name.replace("/", "__"): run[name] - late
              for name in ("objective/scores", "rewards/judge", "rewards/other")}  # fmt: skip
    assert "reward-hacking" not in loud(changed(run, **harder))
    only_held_out = {name: values for name, values in harder.items() if "judge" in name}
    assert "reward-hacking" in loud(changed(run, **only_held_out))


def test_resampling_is_proposed_where_some_groups_differ_and_it_is_off():
    run = simulated(Task(passes(2.7), 0.0, narrows=1.0), Shape(256, group=8), 0)
    for rounds, expected in ((0, "rollout.resample_rounds"), (10, "prompts.path")):
        changed = replace(
            run, settings={**run.settings, "rollout": {**run.settings["rollout"], "resample_rounds": rounds}}
        )
        [finding] = [each for each in diagnose(changed).findings if each.name == "no-signal"]
        assert finding.causes[-1].change.setting == expected


@pytest.mark.parametrize(("judge_rises", "expected"), [(True, set()), (False, {"length-exploitation"})])
def test_longer_responses_with_a_higher_held_out_score_are_no_exploit(judge_rises: bool, expected: set[str]):
    run = simulated(SMOOTH, Shape(64), 2)
    done = np.linspace(0, 1, 60)
    columns: dict[str, Any] = {
        "response__length": 40 + 60 * done,
        "response__length_std": np.full(60, 10.0),
        "response__length_correlation": np.full(60, 0.6),
    }
    if not judge_rises:
        still = run["rewards/judge"][:5].mean() + 0.05 * np.sin(np.arange(60))
        columns |= {"rewards__judge": still, "rewards__other": still}
    assert loud(changed(run, **columns)) & {"length-exploitation"} == expected


@pytest.mark.parametrize(
    ("order", "times", "expected"), [(0.8, 1, {"length-exploitation"}), (0.5, 1, set()), (0.8, 3, set())]
)
def test_a_scorer_that_counts_words_is_a_length_exploit_too(order: float, times: float, expected: set[str]):
    """The length grows by half. Tokens explain a third of the score's rise, or a ninth of three times that rise."""
    run = simulated(SMOOTH, Shape(64), 2)
    done = np.minimum(np.linspace(0, 2, 60), 1)
    still = run["rewards/judge"][:5].mean() + 0.05 * np.sin(np.arange(60))
    columns = {
        "objective__scores": times * run["objective/scores"],
        "response__length": 40 + 20 * done + 0.3 * np.sin(np.arange(60)),
        "response__length_std": np.full(60, 30.0),
        "response__length_correlation": np.full(60, order),
        "rewards__judge": still,
        "rewards__other": still,
    }
    assert loud(changed(run, **columns)) & {"length-exploitation"} == expected


def test_an_outlier_neither_hides_a_fall_nor_causes_one():
    run = simulated(SMOOTH, Shape(64), 3)
    wild = np.where(np.arange(60) == 20, 1000.0, 0.0)  # 64,000 deviations in one of 64 responses
    spoilt = changed(run, objective__scores=run["objective/scores"] + wild,
                     objective__scores_std=run["objective/scores_std"] + 8 * wild)  # fmt: skip
    assert loud(spoilt) == set()
    fallen = changed(spoilt, objective__scores=spoilt["objective/scores"] - 2.5 * (np.arange(60) >= 40))
    assert "instability" in loud(fallen)


def test_a_normaliser_is_not_stale_when_all_responses_are_good():
    columns = healthy(0)
    for figure in ("objective/scores_std", "objective/shaped_scores_std"):
        columns[figure] = np.where(np.arange(40) < 25, columns[figure], 1e-3)
    run = run_of(columns, settings(reward__normalize="running"))
    assert "stale-normaliser" not in loud(run)
    columns["objective/scores_std"] = healthy(0)["objective/scores_std"]
    assert "stale-normaliser" in loud(run_of(columns, settings(reward__normalize="running")))


def test_evidence_is_from_the_last_step_at_which_a_finding_held():
    columns = healthy(0)
    columns["policy/clipfrac"] = np.where(np.arange(40) >= 20, 0.9, columns["policy/clipfrac"])
    columns["policy/clipfrac"][37:] = 0.0
    (finding,) = diagnose(run_of(columns, settings())).findings
    assert (finding.name, finding.is_open) == ("updates-too-large", True)
    clipped = next(evidence.says for evidence in finding.evidence if evidence.figure == "policy/clipfrac")
    assert float(clipped.split(";")[0]) > 0.4  # the last window of the run has 0.225


@pytest.mark.parametrize("statistic", [trailing_mean, trailing_median])
def test_statistics_of_no_steps_are_empty(statistic: Any):
    assert statistic(np.array([]), 5).tolist() == []


def test_trailing_statistics_skip_missing_values():
    x = np.array([1.0, np.nan, 5.0, 100.0, 3.0])
    assert trailing_mean(x, 3).tolist() == [1.0, 1.0, 3.0, 52.5, 36.0]
    assert trailing_median(x, 3).tolist() == [1.0, 1.0, 3.0, 52.5, 5.0]
    assert carry_forward(x).tolist() == [1.0, 1.0, 5.0, 100.0, 3.0]


def test_equal_scores_of_bad_responses_are_not_a_solved_task():
    """One response in three hundred is good, from start to end: scores are equal because nearly all are bad."""
    run = simulated(Task(passes(2.7), 0.0, narrows=1.0), Shape(256, group=8), 0)
    found = {finding.name: finding.severity for finding in diagnose(run).findings}
    assert found["no-signal"] == "critical"


@pytest.mark.parametrize(("judge_rises", "expected"), [(True, set()), (False, {"reward-hacking"})])
def test_repetition_does_not_count_while_a_held_out_score_rises(judge_rises: bool, expected: set[str]):
    run = simulated(SMOOTH, Shape(64), 4)
    columns: dict[str, Any] = {"response__repetition": 0.3 * np.linspace(0, 1, 60)}
    if not judge_rises:
        still = run["rewards/judge"][:5].mean() + 0.05 * np.sin(np.arange(60))
        columns |= {"rewards__judge": still, "rewards__other": still}
    assert loud(changed(run, **columns)) & {"reward-hacking"} == expected


def test_equal_responses_beyond_the_range_are_reward_hacking():
    """Alone, each of the two is another finding."""
    late, columns = np.clip((np.arange(40) - 10) / 10, 0, 1), healthy(0)
    beyond, alike = {"outside_range/reward": 0.9 * late}, {"response/distinct": 1 - 0.7 * late}
    assert loud(run_of(columns | beyond, settings())) == {"reward-out-of-range"}
    assert loud(run_of(columns | alike, settings())) == {"policy-collapse"}
    assert "reward-hacking" in loud(run_of(columns | beyond | alike, settings()))


@pytest.mark.parametrize("judge", [lambda quality: quality, np.exp])
@pytest.mark.parametrize("gain", [2.0, 6.0])
def test_a_held_out_scorer_of_another_scale_rises_too(judge: Any, gain: float):
    """Its deviation may grow with its mean, so that the rise is only a few of the largest deviations."""
    run = simulated(SMOOTH, Shape(64), 4)
    random = np.random.default_rng(0)
    quality = gain * (1 - np.exp(-4 * np.linspace(0, 1, 60)))[:, None] + random.standard_normal((60, 64))
    said = judge(quality + 0.5 * random.standard_normal((60, 64)))
    columns = {"objective__scores": quality.mean(1), "objective__scores_std": quality.std(1)}
    for name in ("judge", "other"):
        columns |= {f"rewards__{name}": said.mean(1), f"spread__{name}": said.std(1)}
    assert loud(changed(run, **columns)) & {"reward-hacking"} == set()
