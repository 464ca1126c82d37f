"""Statistics of a figure over the steps. All look backwards only: of step t they know what was known by then."""

import numpy as np
from numpy.typing import NDArray

from keel.run.read.run import Run, Series

Holds = NDArray[np.bool_]
SHORTEST, LONGEST = 3, 50


def window(run: Run) -> int:
    """Steps that a mean is taken over: a tenth of the run, at least 3, so that it follows a short run and is calm in a
    long one."""
    return int(np.clip(round(run.planned / 10), SHORTEST, LONGEST))


def policy_steps(run: Run) -> Series:
    """Steps in which the policy learned so far, which it does not while only the critic does. [S]"""
    return np.maximum(run.steps - int(run.setting("critic.warmup_steps", 0)), 0).astype(np.float64)


def trailing_mean(x: Series, width: int) -> Series:
    """Mean of the finite ones of the last `width` values, of fewer at the start; nan without any. [S] -> [S]"""
    finite = np.isfinite(x)
    sums, counts = (_trailing_sum(part, width) for part in (np.where(finite, x, 0.0), finite.astype(float)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


def trailing_median(x: Series, width: int) -> Series:
    """Median of the finite ones of the last `width` values, of fewer at the start: one wild value does not move it.
    [S] -> [S]"""
    rows = np.sort(_windows(x, width, np.nan), axis=1)  # nan last
    counts = np.isfinite(rows).sum(1)
    places = np.maximum(counts - 1, 0)
    middle = (rows[np.arange(len(x)), places // 2] + rows[np.arange(len(x)), (places + 1) // 2]) / 2
    return np.where(counts > 0, middle, np.nan)


def start_mean(x: Series, width: int) -> Series:
    """Mean of the first `width` finite values, known from the last of them on and before that nan. [S] -> [S]"""
    places = np.flatnonzero(np.isfinite(x))[:width]
    found = np.full(len(x), np.nan)
    if len(places) == width:
        found[places[-1] :] = x[places].mean()
    return found


def shift_steps(x: Series, steps: int) -> Series:
    """The value of so many steps ago; nan where there is none. [S] -> [S]"""
    return np.concatenate([np.full(min(steps, len(x)), np.nan), x[: max(len(x) - steps, 0)]])


def step_noise(x: Series) -> Series:
    """Standard deviation of the noise of one value, from the differences of neighbours so far: 1.4826 times their
    median size over sqrt(2), which a trend or a few jumps hardly touch. Looked at anew as the run grows by a twentieth.
    [S] -> [S]"""
    sizes, found, looked = np.abs(np.diff(x, prepend=np.nan)), np.full(len(x), np.nan), 0
    for place in range(len(x)):
        if place >= looked * 1.05:
            found[place], looked = 1.4826 * _median(sizes[max(0, place - 4 * LONGEST) : place + 1]) / 2**0.5, place + 1
        else:
            found[place] = found[place - 1]
    return found


def rise(run: Run, metric: str) -> tuple[Series, Series]:
    """How far the mean of the last window is above that of the first, and in units of its noise. [S], [S]"""
    x, width = run[metric], window(run)
    change = trailing_mean(x, width) - start_mean(x, width)
    noise = np.maximum(step_noise(x), 1e-12) * np.sqrt(2 / width)
    return change, change / noise


def highest(x: Series) -> Series:
    """The highest so far, nan before the first. [S] -> [S]"""
    return np.where(np.isfinite(x), np.fmax.accumulate(x), np.nan) if len(x) else x


def carry_forward(x: Series) -> Series:
    """Each value until the next one; nan before the first. [S] -> [S]"""
    places = np.flatnonzero(np.isfinite(x))
    latest = np.searchsorted(places, np.arange(len(x)), side="right") - 1
    return np.where(latest >= 0, x[places[latest]], np.nan) if len(places) else np.full(len(x), np.nan)


def at_least(x: Series, bound: float | Series) -> Holds:
    """False where either is nan."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x >= bound, dtype=bool)


def at_most(x: Series, bound: float | Series) -> Holds:
    """False where either is nan."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x <= bound, dtype=bool)


def latch(on: Holds, off: Holds) -> Holds:
    """True from where `on` holds until `off` does. [S], [S] -> [S]"""
    result, holds = np.zeros(len(on), dtype=bool), False
    for place in range(len(on)):
        holds = bool(on[place]) or (holds and not off[place])
        result[place] = holds
    return result


def last(x: Series) -> float:
    """The last finite value; nan without one."""
    finite = x[np.isfinite(x)]
    return float(finite[-1]) if len(finite) else float("nan")


def first(x: Series) -> float:
    """The first finite value; nan without one."""
    finite = x[np.isfinite(x)]
    return float(finite[0]) if len(finite) else float("nan")


def _trailing_sum(x: Series, width: int) -> Series:
    return np.asarray(_windows(x, width, 0.0).sum(1))


def _windows(x: Series, width: int, before: float) -> NDArray[np.float64]:
    """The last `width` values up to each, with `before` for those that are not there. [S] -> [S, width]"""
    if not len(x):
        return np.zeros((0, width))
    return np.lib.stride_tricks.sliding_window_view(np.concatenate([np.full(width - 1, before), x]), width)


def _median(x: Series) -> float:
    finite = x[np.isfinite(x)]
    return float(np.median(finite)) if len(finite) else float("nan")
