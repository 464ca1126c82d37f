"""What chance does is no finding: few prompts, groups, coarse and sparse scores; and what it cannot do is one."""

from dataclasses import replace

import numpy as np
import pytest

from keel.diagnose.chance import answers_of, fall_from_best, mean_error, prompts_of, score_rise
from keel.diagnose.doctor import diagnose
from keel.diagnose.run import Run

from .runs import healthy, run_of, settings
from .simulated import TASKS, Shape, simulated

SHAPES = [Shape(4), Shape(8), Shape(64), Shape(256), Shape(32, group=4), Shape(64, group=8), Shape(64, steps=20)]


def loud(run: Run) -> set[str]:
    return {finding.name for finding in diagnose(run).findings if finding.severity != "notice"}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.batch} in {shape.group}, {shape.steps} steps")
@pytest.mark.parametrize("task", TASKS)
def test_a_healthy_run_is_left_alone_whatever_chance_does(task: str, shape: Shape):
    if task == "good, then better" and shape.batch < 64:
        pytest.skip("so few answers are all paid the same from the first step to the last")
    # Groups of which nearly none has a right answer are a fault of the prompts, for as long as it is so.
    allowed = {"no-signal"} if task.startswith("sparse") and shape.group > 1 else set()
    for seed in range(100, 103):
        run = simulated(TASKS[task], shape, seed)
        for step in (shape.steps // 4, shape.steps // 2, shape.steps):
            assert loud(run.until(step)) <= allowed, f"seed {seed}, step {step}"


def test_answers_and_prompts_of_a_step():
    run = run_of(healthy(), settings(rollout__batch_size=64, rollout__group_size=8))
    assert (answers_of(run), prompts_of(run)) == (64, 8)


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
    assert found[0].causes[0].what.startswith("the task is learned")

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
