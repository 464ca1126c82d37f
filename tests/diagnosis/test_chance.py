"""What chance does is no finding: few prompts, groups, coarse and sparse scores; and what it cannot do is one."""

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


# A few answers of which nearly all are right are all paid the same from the first step to the last.
CASES = [(task, shape) for task in TASKS for shape in SHAPES if task != "good, then better" or shape.batch >= 64]


@pytest.mark.parametrize(("task", "shape"), CASES, ids=str)
def test_a_healthy_run_is_left_alone_whatever_chance_does(task: str, shape: Shape):
    # Groups whose answers are nearly all wrong, or all right, are a fault of the prompts, for as long as it is so.
    allowed = {"no-signal"} if task.startswith(("sparse", "good")) and shape.group > 1 else set()
    for seed in range(100, 103):
        run = simulated(TASKS[task], shape, seed)
        for step in (shape.steps // 4, shape.steps // 2, shape.steps):
            assert loud(run.until(step)) <= allowed, f"seed {seed}, step {step}"


def test_answers_and_prompts_of_a_step():
    run = run_of(healthy(), settings(rollout__batch_size=64, rollout__group_size=8))
    assert (responses_per_step(run), prompts_per_step(run)) == (64, 8)


@pytest.mark.parametrize(("alike", "expected"), [(0.0, 0.125), (1.0, 0.3536)])
def test_the_error_of_a_mean_knows_how_alike_the_answers_to_a_prompt_are(alike: float, expected: float):
    """64 answers of deviation 1 in groups of 8: 1 / sqrt(64) when independent, 1 / sqrt(8) when all of a group are the
    same."""
    random = np.random.default_rng(0)
    steps = []
    for _ in range(300):
        of_prompt, own = random.standard_normal(8).repeat(8), random.standard_normal(64)
        steps.append(alike**0.5 * of_prompt + (1 - alike) ** 0.5 * own)
    columns = {
        "objective/scores": [scores.mean() for scores in steps],
        "objective/scores_std": [scores.std() for scores in steps],
    }
    run = run_of(columns, settings(300, rollout__group_size=8))
    found = mean_error(run, "objective/scores")
    assert found[-1] == pytest.approx(expected, rel=0.2)


def flat(values: list[float], spread: float = 1.0, batch: int = 100) -> Run:
    """A run of 40 steps, so that windows have 4."""
    columns = {"objective/scores": values, "objective/scores_std": np.full(len(values), spread)}
    return run_of(columns, settings(40, rollout__batch_size=batch))


def test_a_rise_is_told_in_deviations_and_in_standard_errors():
    """From 0 to 1 at a deviation of 2 over 100 answers: half a deviation. A mean of 4 steps wanders by 2 / sqrt(400), a
    difference of two by sqrt(2) as much: 7.07 of them, a little less for the deviation is of a sample."""
    gain, errors = score_rise(flat([0.0] * 4 + [1.0] * 36, spread=2.0))
    assert gain[-1] == pytest.approx(0.5)
    assert errors[-1] == pytest.approx(7.07, rel=0.01)
    assert np.isnan(gain[:3]).all()


def test_a_fall_counts_from_the_best_less_its_luck():
    """Best of ten windows: sqrt(ln 10) = 1.517 errors are luck."""
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
        columns[figure] = columns[figure] - 3.0  # so that a scale moves all of them
        columns[figure][steps] = factor * columns[figure][steps] + offset
    for figure in ("objective/scores_std", "objective/shaped_scores_std"):
        columns[figure][steps] *= factor
    columns["policy/step_kl"] = np.full(40, 0.01)
    return run_of(columns, settings(**{f"rollout__{name}": value for name, value in given.items()}))


def shift_of(run: Run) -> int | None:
    """First step of a critical reward-shift."""
    found = [each for each in diagnose(run).findings if each.name == "reward-shift" and each.severity == "critical"]
    return found[0].first_step if found else None


@pytest.mark.parametrize("change", [{"factor": 8.0}, {"factor": 0.1}, {"offset": 6.0}, {"offset": -6.0}], ids=str)
def test_a_jump_of_scale_or_offset_is_named_with_its_step(change: dict[str, float]):
    assert shift_of(shifted(**change)) == 21


@pytest.mark.parametrize("change", [{"factor": 8.0}, {"offset": 6.0}], ids=str)
def test_a_single_wild_step_is_no_jump(change: dict[str, float]):
    assert shift_of(shifted(**change, steps=slice(20, 21))) is None


def test_what_a_large_update_can_do_is_no_jump():
    run = shifted(offset=6.0)
    columns = dict(run.columns) | {"policy/step_kl": np.full(40, 0.2)}  # times 20 tokens: 4 nats
    assert shift_of(replace(run, columns=columns)) is None


def test_quantiles_of_four_answers_tell_of_no_jump():
    assert shift_of(shifted(factor=8.0, batch_size=4)) is None


SMOOTH = TASKS["smooth"]


def changed(run: Run, given: dict[str, Any] | None = None, **columns: Any) -> Run:
    """With other figures (names with __ for the slash), and other settings by section."""
    found = {name.replace("__", "/"): np.asarray(values, dtype=float) for name, values in columns.items()}
    settings = {name: {**run.settings.get(name, {}), **values} for name, values in (given or {}).items()}
    return replace(run, columns={**run.columns, **found}, settings={**run.settings, **settings})


def test_a_critic_that_warms_up_is_no_fault_of_the_updates():
    run, frozen = simulated(SMOOTH, Shape(64), 0), np.arange(60) < 15
    still = np.where(frozen, 1e-12, run["policy/step_kl"])
    warm = changed(run, {"critic": {"warmup_steps": 15}}, policy__step_kl=still)
    assert "updates-too-small" in loud(changed(run, policy__step_kl=still).until(15))
    assert loud(warm.until(15)) == loud(warm) == set()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_beside_normalised_advantages_the_scores_have_no_scale(scale: float):
    """kl_coef 0.04 in the loss of GRPO is small whatever the scores are measured in; in the reward it is not."""
    run = simulated(Task(lambda quality: scale * quality, 1.5), Shape(64, group=8), 0)
    in_loss = {"algorithm": {"name": "grpo", "kl_in": "loss", "normalize_std": True, "kl_coef": 0.04}}
    coefficient = {"objective__kl_coef": np.full(60, 0.04), "objective__non_score_reward": -0.04 * run["objective/kl"]}
    assert loud(changed(run, in_loss, **coefficient)) == set()
    in_reward = {"algorithm": {"name": "grpo", "kl_in": "reward", "kl_coef": 0.04}}
    assert ("kl-too-tight" in loud(changed(run, in_reward, **coefficient))) == (scale < 1)


def test_harder_prompts_are_no_hacking():
    """From the middle on all scorers say one deviation less: nothing has parted."""
    run, late = simulated(Task(SMOOTH.pay, 2.5), Shape(64), 1), 1.2 * (np.arange(60) >= 30)
    harder = {name.replace("/", "__"): run[name] - late
              for name in ("objective/scores", "rewards/judge", "rewards/other")}  # fmt: skip
    assert "reward-hacking" not in loud(changed(run, **harder))
    only_theirs = {name: values for name, values in harder.items() if "judge" in name}
    assert "reward-hacking" in loud(changed(run, **only_theirs))


@pytest.mark.parametrize(("judge_rises", "expected"), [(True, set()), (False, {"length-exploitation"})])
def test_longer_answers_that_another_judge_likes_too_are_no_exploit(judge_rises: bool, expected: set[str]):
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
def test_a_scorer_that_counts_something_else_than_tokens_is_one_of_length(
    order: float, times: float, expected: set[str]
):
    """The length grows by half of its mean: a third of the rise by tokens, or a ninth of the triple."""
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


def test_one_wild_answer_neither_hides_a_fall_nor_makes_one():
    run = simulated(SMOOTH, Shape(64), 3)
    wild = np.where(np.arange(60) == 20, 1000.0, 0.0)  # 64,000 deviations in one of 64 answers
    spoilt = changed(run, objective__scores=run["objective/scores"] + wild,
                     objective__scores_std=run["objective/scores_std"] + 8 * wild)  # fmt: skip
    assert loud(spoilt) == set()
    fallen = changed(spoilt, objective__scores=spoilt["objective/scores"] - 2.5 * (np.arange(60) >= 40))
    assert "instability" in loud(fallen)


def test_a_normaliser_is_not_stale_because_all_answers_are_right():
    columns = healthy(0)
    for figure in ("objective/scores_std", "objective/shaped_scores_std"):
        columns[figure] = np.where(np.arange(40) < 25, columns[figure], 1e-3)
    run = run_of(columns, settings(reward__normalize="running"))
    assert "stale-normaliser" not in loud(run)
    columns["objective/scores_std"] = healthy(0)["objective/scores_std"]
    assert "stale-normaliser" in loud(run_of(columns, settings(reward__normalize="running")))


def test_evidence_is_of_the_last_step_in_which_a_finding_held():
    columns = healthy(0)
    columns["policy/clipfrac"] = np.where(np.arange(40) >= 20, 0.9, columns["policy/clipfrac"])
    columns["policy/clipfrac"][37:] = 0.0
    (finding,) = diagnose(run_of(columns, settings())).findings
    assert (finding.name, finding.is_open) == ("updates-too-large", True)
    clipped = next(said.says for said in finding.evidence if said.figure == "policy/clipfrac")
    assert float(clipped.split(";")[0]) > 0.4  # the last window of all has 0.225


@pytest.mark.parametrize("statistic", [trailing_mean, trailing_median])
def test_statistics_of_no_steps_are_none(statistic: Any):
    assert statistic(np.array([]), 5).tolist() == []


def test_statistics_of_the_last_few_values_pass_over_what_is_missing():
    x = np.array([1.0, np.nan, 5.0, 100.0, 3.0])
    assert trailing_mean(x, 3).tolist() == [1.0, 1.0, 3.0, 52.5, 36.0]
    assert trailing_median(x, 3).tolist() == [1.0, 1.0, 3.0, 52.5, 5.0]
    assert carry_forward(x).tolist() == [1.0, 1.0, 5.0, 100.0, 3.0]


def test_a_task_that_nearly_nobody_solves_is_not_solved():
    """One answer in three hundred is right, at the end as at the start: all are alike because nearly all are wrong."""
    run = simulated(Task(passes(2.7), 0.0, narrows=1.0), Shape(256, group=8), 0)
    found = {finding.name: finding.severity for finding in diagnose(run).findings}
    assert found["no-signal"] == "critical"


@pytest.mark.parametrize(("judge_rises", "expected"), [(True, set()), (False, {"reward-hacking"})])
def test_repetition_is_no_sign_while_another_judge_likes_the_answers(judge_rises: bool, expected: set[str]):
    run = simulated(SMOOTH, Shape(64), 4)
    columns: dict[str, Any] = {"response__repetition": 0.3 * np.linspace(0, 1, 60)}
    if not judge_rises:
        still = run["rewards/judge"][:5].mean() + 0.05 * np.sin(np.arange(60))
        columns |= {"rewards__judge": still, "rewards__other": still}
    assert loud(changed(run, **columns)) & {"reward-hacking"} == expected


def test_answers_beyond_the_range_that_are_all_the_same_are_hacking():
    """Each by itself is another finding."""
    late, columns = np.clip((np.arange(40) - 10) / 10, 0, 1), healthy(0)
    beyond, alike = {"outside_range/reward": 0.9 * late}, {"response/distinct": 1 - 0.7 * late}
    assert loud(run_of(columns | beyond, settings())) == {"reward-out-of-range"}
    assert loud(run_of(columns | alike, settings())) == {"policy-collapse"}
    assert "reward-hacking" in loud(run_of(columns | beyond | alike, settings()))


@pytest.mark.parametrize("judge", [lambda quality: quality, np.exp])
@pytest.mark.parametrize("gain", [2.0, 6.0])
def test_a_judge_of_another_scale_rises_too(judge: Any, gain: float):
    """Its deviation may grow with its mean, so that it cannot rise by many of the largest."""
    run = simulated(SMOOTH, Shape(64), 4)
    random = np.random.default_rng(0)
    quality = gain * (1 - np.exp(-4 * np.linspace(0, 1, 60)))[:, None] + random.standard_normal((60, 64))
    said = judge(quality + 0.5 * random.standard_normal((60, 64)))
    columns = {"objective__scores": quality.mean(1), "objective__scores_std": quality.std(1)}
    for name in ("judge", "other"):
        columns |= {f"rewards__{name}": said.mean(1), f"spread__{name}": said.std(1)}
    assert loud(changed(run, **columns)) & {"reward-hacking"} == set()
