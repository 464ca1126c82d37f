"""The effect of chance on the mean of a step: its standard error, and changes of scores in units of it.

The responses to one prompt are alike, so a step tells no less than as many independent responses as it has prompts, and
no more than all its responses.
"""

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

SIGNIFICANT = 4.0  # standard errors: a run of thousands of steps does not show as much by chance
SCORES = "objective/scores"
MIN_NOISE_STEPS = 8  # with fewer values, the differences of neighbours are too few to estimate the noise
VANISHING = 1e-12  # a unit below this means that nothing varies
RISE, RISE_ERRORS = 0.25, 2.0  # deviations and standard errors by which a solved task has risen
NEAR_BEST = 0.1  # of the range of all scores so far: a solved task has its mean this near the top


def responses_per_step(run: Run) -> int:
    return int(run.setting("rollout.batch_size", 64))


def prompts_per_step(run: Run) -> float:
    return max(responses_per_step(run) / int(run.setting("rollout.group_size", 1)), 1.0)


def spread_metric(metric: str) -> str:
    """Return the metric that holds the standard deviation of this score over the responses of a step."""
    return "objective/scores_std" if metric == SCORES else metric.replace("rewards/", "spread/", 1)


def deviation_unit(run: Run, metric: str) -> Series:
    """Return the deviation in which changes of a score are measured: the largest windowed median so far. [S]

    The largest, because scores that are all alike at first (a task never solved) give no unit. A median over the
    window, because one outlier must not set the unit.
    """
    width = window(run)
    spread = trailing_median(run[spread_metric(metric)], width)
    return np.where(np.isfinite(start_mean(run[metric], width)), highest(spread), np.nan)


def mean_error(run: Run, metric: str) -> Series:
    """Return the standard error of a step's mean, the larger of the first window's and the last two windows'. [S]"""
    spread, width = run[spread_metric(metric)], window(run)
    initial = carry_forward(np.where(np.arange(len(spread)) == width - 1, trailing_median(spread, width), np.nan))
    count = max(prompts_per_step(run), 2.0)
    # metrics.jsonl has the deviation of the sample, which underestimates that of few prompts.
    correction = np.sqrt(count / (count - 1))
    return bounded_error(run, metric, np.fmax(initial, trailing_median(spread, 2 * width)) * correction)


def bounded_error(run: Run, metric: str, spread: float | Series) -> Series:
    """Return the standard error of a step's mean whose deviation over responses is `spread`. [S]

    It is between spread / sqrt(responses), if all were independent, and spread / sqrt(prompts), if the responses to
    a prompt were all equal. The noise from step to step decides where.
    """
    lowest, highest_error = spread / np.sqrt(responses_per_step(run)), spread / np.sqrt(prompts_per_step(run))
    is_known = np.cumsum(np.isfinite(run[metric])) > MIN_NOISE_STEPS
    return np.where(is_known, np.clip(step_noise(run[metric]), lowest, highest_error), highest_error)


def score_rise(run: Run, metric: str = SCORES) -> tuple[Series, Series]:
    """Return the change of a score's mean from the first window to the last, in deviations and in standard errors.

    [S], [S]; the deviation is `deviation_unit`.
    """
    width = window(run)
    gain = trailing_mean(run[metric], width) - start_mean(run[metric], width)
    return standardized_change(run, metric, gain)


def fall_from_best(run: Run, metric: str = SCORES) -> tuple[Series, Series]:
    """Return how far a score is below its best window, in deviations and in standard errors. [S], [S]

    The best of n windows is partly luck, about sqrt(ln n) standard errors of a difference, which are subtracted.
    """
    width, smooth = window(run), smooth_score(run, metric)
    fall, errors = standardized_change(run, metric, highest(smooth) - smooth)
    return fall, errors - np.sqrt(np.log(np.maximum(run.steps / width, 1.0)))


def smooth_score(run: Run, metric: str) -> Series:
    """Return the median step of a window, from the first full window on: one outlier is no best value. [S]"""
    width = window(run)
    return np.where(np.isfinite(start_mean(run[metric], width)), trailing_median(run[metric], width), np.nan)


def standardized_change(run: Run, metric: str, change: Series) -> tuple[Series, Series]:
    """Return a change between two windows in deviations and in standard errors; 0 where nothing varies. [S], [S]"""

    def in_units(unit: Series) -> Series:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(at_least(unit, VANISHING), change / unit, np.where(np.isfinite(unit), 0.0, np.nan))

    return in_units(deviation_unit(run, metric)), in_units(mean_error(run, metric) * np.sqrt(2 / window(run)))


def resolution(run: Run, metric: str = SCORES) -> Series:
    """Return the smallest detectable change of a score between two windows: two standard errors, in deviations. [S]"""
    return standardized_change(run, metric, 2 * mean_error(run, metric) * np.sqrt(2 / window(run)))[0]


def relative_spread(run: Run, metric: str) -> Series:
    """Return the deviation of a score over the responses of a step, relative to the first window. [S]"""
    spread, width = run[spread_metric(metric)], window(run)
    with np.errstate(invalid="ignore", divide="ignore"):
        return trailing_mean(spread, width) / start_mean(spread, width)


def is_solved(run: Run, width: int) -> Holds:
    """Whether equal scores mean that all responses are good. [S]

    The score rose and did not fall, or its mean over `width` steps is in the top tenth of all scores so far.
    """
    gain, errors = score_rise(run)
    rose = at_least(gain, RISE) & at_least(errors, RISE_ERRORS) & at_most(fall_from_best(run)[0], RISE)
    best = np.fmax(highest(run[f"{SCORES}_high"]), highest(run[SCORES]))
    worst = -highest(2 * run[spread_metric(SCORES)] - run[SCORES])
    varied = at_least(best - worst, 1e-6 * np.maximum(1.0, np.abs(best)))
    mean, middle = trailing_mean(run[SCORES], width), trailing_mean(run[f"{SCORES}_median"], width)
    # Where only few responses are good, most are below the mean, and the median is too.
    few_bad = at_most(mean, middle + 1e-6 * np.abs(best - worst))
    return rose | (varied & few_bad & at_least(mean, best - NEAR_BEST * (best - worst)))


def held_out_score_rose(run: Run) -> Holds:
    """Whether some held-out scorer rates the responses higher than at the start. [S]"""
    rose = np.zeros(len(run.steps), dtype=bool)
    for name in run.held_out_scorers():
        gain, errors = score_rise(run, f"rewards/{name}")
        rose |= at_least(gain, RISE) & at_least(errors, SIGNIFICANT)
    return rose
