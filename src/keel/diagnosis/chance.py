"""What chance alone does to the mean of a step: how many answers it is made of, and how far it wanders."""

import numpy as np

from keel.run.read.run import Run, Series
from keel.run.read.series import (
    Holds,
    at_least,
    at_most,
    carry_forward,
    highest,
    start_mean,
    step_noise,
    trailing_mean,
    trailing_median,
    window,
)

SURE = 4.0  # standard errors, so that no run of thousands of steps shows as much by chance
SCORES = "objective/scores"
SETTLED = 8  # steps, before which neighbours say little of the noise


def responses_per_step(run: Run) -> int:
    """Answers of a step."""
    return int(run.setting("rollout.batch_size", 64))


def prompts_per_step(run: Run) -> float:
    """Prompts of a step. The answers to one prompt are alike, so a step knows no less than so many answers would tell,
    and no more than all of them."""
    return max(responses_per_step(run) / int(run.setting("rollout.group_size", 1)), 1.0)


def spread_metric(metric: str) -> str:
    """The figure that holds the standard deviation of this score over a step's answers."""
    return "objective/scores_std" if metric == SCORES else metric.replace("rewards/", "spread/", 1)


def yardstick(run: Run, metric: str) -> Series:
    """The deviation that changes of a score are measured in: of the first answers, or the largest since, for scores
    that are all alike at first (a task never solved) tell nothing of what is much. [S]"""
    width = window(run)
    spread = trailing_median(run[spread_metric(metric)], width)  # one wild answer is no yardstick
    return np.where(np.isfinite(start_mean(run[metric], width)), highest(spread), np.nan)


def mean_error(run: Run, metric: str) -> Series:
    """Standard error of a step's mean, in the first window or the last two, whichever is more. [S]

    Between deviation / sqrt(answers), were all independent, and deviation / sqrt(prompts), were the answers to a prompt
    all the same; which of them, the noise from step to step says.
    """
    spread, width = run[spread_metric(metric)], window(run)
    begun = carry_forward(np.where(np.arange(len(spread)) == width - 1, trailing_median(spread, width), np.nan))
    few = max(prompts_per_step(run), 2.0)  # of so many the deviation is found too small
    return bounded_error(run, metric, np.fmax(begun, trailing_median(spread, 2 * width)) * np.sqrt(few / (few - 1)))


def bounded_error(run: Run, metric: str, spread: float | Series) -> Series:
    """Standard error of a step's figure whose deviation over answers is `spread`. [S]"""
    least, most = spread / np.sqrt(responses_per_step(run)), spread / np.sqrt(prompts_per_step(run))
    known = np.cumsum(np.isfinite(run[metric])) > SETTLED
    return np.where(known, np.clip(step_noise(run[metric]), least, most), most)


def score_rise(run: Run, metric: str = SCORES) -> tuple[Series, Series]:
    """How far the mean of a score over the last window is above that over the first, in deviations (`yardstick`) and in
    standard errors. [S], [S]"""
    width = window(run)
    gain = trailing_mean(run[metric], width) - start_mean(run[metric], width)
    return standardized_change(run, metric, gain)


def fall_from_best(run: Run, metric: str = SCORES) -> tuple[Series, Series]:
    """How far a score in the last window (`steady`) is below its highest in any window, likewise. [S], [S]

    The highest of n windows is so by luck too: about sqrt(ln n) standard errors of a difference, which do not count.
    """
    width, smooth = window(run), steady(run, metric)
    fall, errors = standardized_change(run, metric, highest(smooth) - smooth)
    return fall, errors - np.sqrt(np.log(np.maximum(run.steps / width, 1.0)))


def steady(run: Run, metric: str) -> Series:
    """The middle step of a window, from the first whole one on: one wild answer is no best. [S]"""
    width = window(run)
    return np.where(np.isfinite(start_mean(run[metric], width)), trailing_median(run[metric], width), np.nan)


def standardized_change(run: Run, metric: str, change: Series) -> tuple[Series, Series]:
    """A change between two windows in deviations and in standard errors; 0 where nothing varies. [S], [S]"""
    found = []
    for unit in (yardstick(run, metric), mean_error(run, metric) * np.sqrt(2 / window(run))):
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.where(at_least(unit, 1e-12), change / unit, np.where(np.isfinite(unit), 0.0, np.nan)))
    return found[0], found[1]


def resolution(run: Run, metric: str = SCORES) -> Series:
    """The least change of a score between two windows that could be told from none: two standard errors, in
    deviations. [S]"""
    return standardized_change(run, metric, 2 * mean_error(run, metric) * np.sqrt(2 / window(run)))[0]


def relative_spread(run: Run, metric: str) -> Series:
    """The deviation of a score over the answers of a step, over what it was in the first window. [S]"""
    spread, width = run[spread_metric(metric)], window(run)
    with np.errstate(invalid="ignore", divide="ignore"):
        return trailing_mean(spread, width) / start_mean(spread, width)


def is_solved(run: Run, width: int) -> Holds:
    """Whether the answers are paid alike because they are all good: the score rose to where it is, or its mean over
    `width` steps lies in the uppermost tenth of all that was seen. [S]"""
    gain, errors = score_rise(run)
    rose = at_least(gain, 0.25) & at_least(errors, 2.0) & at_most(fall_from_best(run)[0], 0.25)
    best = np.fmax(highest(run[f"{SCORES}_high"]), highest(run[SCORES]))
    worst = -highest(2 * run[spread_metric(SCORES)] - run[SCORES])
    varied = at_least(best - worst, 1e-6 * np.maximum(1.0, np.abs(best)))
    mean, middle = trailing_mean(run[SCORES], width), trailing_mean(run[f"{SCORES}_median"], width)
    few_bad = at_most(mean, middle + 1e-6 * np.abs(best - worst))  # where few are good, most lie below the mean
    return rose | (varied & few_bad & at_least(mean, best - 0.1 * (best - worst)))


def held_out_score_rose(run: Run) -> Holds:
    """Whether a held-out scorer says that the answers are better than at the start. [S]"""
    found = np.zeros(len(run.steps), dtype=bool)
    for name in run.held_out_scorers():
        gain, errors = score_rise(run, f"rewards/{name}")
        found |= at_least(gain, 0.25) & at_least(errors, SURE)
    return found
