"""Statistics of a metric over the steps. The value at step t depends only on data up to step t."""

import numpy as np
from numpy.typing import NDArray

from keel.run.read.run import Run, Series

Holds = NDArray[np.bool_]
SHORTEST, LONGEST = 3, 50


def window(run: Run) -> int:
    """Return the number of steps for a mean: a tenth of the run, within SHORTEST and LONGEST."""
    return int(np.clip(round(run.planned / 10), SHORTEST, LONGEST))


def policy_steps(run: Run) -> Series:
    """Return the steps so far in which the policy learned: those after the critic's warm-up. [S]"""
    return np.maximum(run.steps - int(run.setting("critic.warmup_steps", 0)), 0).astype(np.float64)


def trailing_mean(x: Series, width: int) -> Series:
    """Return the mean of the finite values among the last `width`, fewer at the start; nan without any. [S] -> [S]"""
    finite = np.isfinite(x)
    sums, counts = (_trailing_sum(values, width) for values in (np.where(finite, x, 0.0), finite.astype(float)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


def trailing_median(x: Series, width: int) -> Series:
    """Return the median of the finite values among the last `width`, fewer at the start; nan without any. [S] -> [S]"""
    rows = np.sort(_windows(x, width, np.nan), axis=1)  # sorts nan to the end
    counts = np.isfinite(rows).sum(1)
    places = np.maximum(counts - 1, 0)
    middle = (rows[np.arange(len(x)), places // 2] + rows[np.arange(len(x)), (places + 1) // 2]) / 2
    return np.where(counts > 0, middle, np.nan)


def start_mean(x: Series, width: int) -> Series:
    """Return the mean of the first `width` finite values from the last of them on; nan until then. [S] -> [S]"""
    indices = np.flatnonzero(np.isfinite(x))[:width]
    mean = np.full(len(x), np.nan)
    if len(indices) == width:
        mean[indices[-1] :] = x[indices].mean()
    return mean


def shift_steps(x: Series, steps: int) -> Series:
    """Return the value from `steps` steps earlier; nan where there is none. [S] -> [S]"""
    return np.concatenate([np.full(min(steps, len(x)), np.nan), x[: max(len(x) - steps, 0)]])


def step_noise(x: Series) -> Series:
    """Return the standard deviation of the noise of one value, from the differences of neighbours. [S] -> [S]

    1.4826 * median absolute difference / sqrt(2), which a trend or a few jumps hardly affect.
    """
    sizes, noise, estimated = np.abs(np.diff(x, prepend=np.nan)), np.full(len(x), np.nan), 0
    for index in range(len(x)):
        # A median at each of thousands of steps would be slow, so it is renewed when the run has grown by 5%.
        if index >= estimated * 1.05:
            recent = sizes[max(0, index - 4 * LONGEST) : index + 1]
            noise[index], estimated = 1.4826 * _median(recent) / 2**0.5, index + 1
        else:
            noise[index] = noise[index - 1]
    return noise


def rise(run: Run, metric: str) -> tuple[Series, Series]:
    """Return the change of a metric's mean from the first window to the last, also in units of its noise. [S], [S]"""
    x, width = run[metric], window(run)
    change = trailing_mean(x, width) - start_mean(x, width)
    noise = np.maximum(step_noise(x), 1e-12) * np.sqrt(2 / width)
    return change, change / noise


def highest(x: Series) -> Series:
    """Return the highest value so far; nan where x is nan. [S] -> [S]"""
    return np.where(np.isfinite(x), np.fmax.accumulate(x), np.nan) if len(x) else x


def carry_forward(x: Series) -> Series:
    """Fill gaps with the last finite value; nan before the first one. [S] -> [S]"""
    indices = np.flatnonzero(np.isfinite(x))
    latest = np.searchsorted(indices, np.arange(len(x)), side="right") - 1
    return np.where(latest >= 0, x[indices[latest]], np.nan) if len(indices) else np.full(len(x), np.nan)


def at_least(x: Series, bound: float | Series) -> Holds:
    """Compare x >= bound; False where either is nan."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x >= bound, dtype=bool)


def at_most(x: Series, bound: float | Series) -> Holds:
    """Compare x <= bound; False where either is nan."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x <= bound, dtype=bool)


def latch(on: Holds, off: Holds) -> Holds:
    """Return True from where `on` holds until `off` holds. [S], [S] -> [S]"""
    result, holds = np.zeros(len(on), dtype=bool), False
    for index in range(len(on)):
        holds = bool(on[index]) or (holds and not off[index])
        result[index] = holds
    return result


def last(x: Series) -> float:
    """Return the last finite value; nan without one."""
    finite = x[np.isfinite(x)]
    return float(finite[-1]) if len(finite) else float("nan")


def first(x: Series) -> float:
    """Return the first finite value; nan without one."""
    finite = x[np.isfinite(x)]
    return float(finite[0]) if len(finite) else float("nan")


def _trailing_sum(x: Series, width: int) -> Series:
    return np.asarray(_windows(x, width, 0.0).sum(1))


def _windows(x: Series, width: int, padding: float) -> NDArray[np.float64]:
    """Return the last `width` values at each step, with `padding` before the first one. [S] -> [S, width]"""
    if not len(x):
        return np.zeros((0, width))
    return np.lib.stride_tricks.sliding_window_view(np.concatenate([np.full(width - 1, padding), x]), width)


def _median(x: Series) -> float:
    finite = x[np.isfinite(x)]
    return float(np.median(finite)) if len(finite) else float("nan")
