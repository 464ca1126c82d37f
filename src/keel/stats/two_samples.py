"""Compare two samples: the distance between them, its test, and the number of rows that the test needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import NDArray

from keel.stats.bootstrap import draw_counts

Numbers = NDArray[np.float64]
DRAWS = 4_999
RESAMPLES = 2_000
AT_ONCE = 2**23  # numbers in memory while permuting; no result depends on it
POWER = 0.8  # share of samples in which a detectable difference is detected
SHARES = 2_001  # size of the grid of differences between two shares
MOST_ROWS = 1_000_000  # largest number of rows that is recommended
_quantile = NormalDist().inv_cdf


def distances(old: Numbers, new: Numbers, seed: int, draws: int = DRAWS) -> tuple[Numbers, Numbers]:
    """Compute the Kolmogorov-Smirnov distance of each column, and the p-value of its permutation test.

    The distance is the largest difference between the two cumulative distributions, 0 to 1. For yes-or-no columns, it
    is the difference of the shares. The p-value is the share of random divisions of all rows that give a distance as
    large; it is valid with ties and with few rows. NaN entries are left out.

    If no division does, the p-value is e exp(-2 nm / (n + m) D^2) where this is smaller: the bound of Dvoretzky, Kiefer
    and Wolfowitz for two samples, with a constant that holds for small ones (Wei and Dudley 2012).

    Args:
        old: [n, F].
        new: [m, F].

    Returns distances [F] and p-values [F].
    """
    both = np.concatenate([old, new])
    is_new = np.arange(len(both)) >= len(old)
    distance = compute_distances(is_new[None, :], both)[0]
    random = np.random.default_rng(seed)
    at_least = np.zeros(both.shape[1])
    step = max(1, AT_ONCE // len(both))
    for start in range(0, draws, step):
        shuffled = random.permuted(np.tile(is_new, (min(step, draws - start), 1)), axis=1)
        at_least += (compute_distances(shuffled, both) >= distance - 1e-12).sum(0)  # equal but for rounding counts
    n, m = (np.isfinite(side).sum(0) for side in (old, new))
    tail = math.e * np.exp(-2 * n * m / np.maximum(n + m, 1) * distance**2)
    p = (1 + at_least) / (1 + draws)
    return distance, np.where(at_least == 0, np.minimum(p, tail), p)


def compute_distances(is_new: NDArray[np.bool_], values: Numbers) -> Numbers:
    """Compute the distance of each column for each division of the rows. [D, N], [N, F] -> [D, F]"""
    result = np.zeros((len(is_new), values.shape[1]))
    for number, column in enumerate(values.T):
        known = np.flatnonzero(np.isfinite(column))
        order = known[np.argsort(column[known], kind="stable")]
        if not len(order):
            continue
        # The distributions are compared after the last of equal values: inside a run of ties their order is arbitrary.
        last = np.flatnonzero(np.append(column[order][1:] != column[order][:-1], True))
        num_new = np.take(is_new, order, axis=1).cumsum(1, dtype=np.int32)  # new rows up to each value
        count, num_all = num_new[:, -1:], last + 1
        with np.errstate(divide="ignore", invalid="ignore"):  # a division may leave one side without rows
            gaps = num_new[:, last] * (len(order) / (count * (len(order) - count))) - num_all / (len(order) - count)
        result[:, number] = np.nan_to_num(np.abs(gaps).max(1), posinf=0.0)
    return result


def superiority(old: Numbers, new: Numbers) -> float:
    """Return the share of pairs in which the new value is above the old one, ties counting half.

    0.5 is no shift (Vargha and Delaney 2000). NaN where a side has no finite value.
    """
    old, new = np.sort(old[np.isfinite(old)]), new[np.isfinite(new)]
    if not len(old) or not len(new):
        return math.nan
    below, up_to = (np.searchsorted(old, new, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(old))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values so that the probability of any false alarm among all tests is at most the level (Holm 1979)."""
    order = np.argsort(p_values)
    raised = np.array(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(value) for value in result]


@dataclass(frozen=True)
class Rows:
    """The number of rows on both sides of a comparison."""

    old: int
    new: int
    share: float | None  # of the old rows, for a yes-or-no column

    @classmethod
    def from_samples(cls, old: Numbers, new: Numbers) -> Self:
        """Count the rows that are not NaN.

        The share has two successes and two failures added (Agresti and Coull 1998): zero observed successes are no
        proof of a share of zero.
        """
        old, new = old[np.isfinite(old)], new[np.isfinite(new)]
        yes_or_no = np.isin(np.concatenate([old, new]), (0.0, 1.0)).all()
        return cls(len(old), len(new), float((old.sum() + 2) / (len(old) + 4)) if yes_or_no else None)


def detectable_distance(rows: Rows, level: float) -> float:
    """Return the smallest distance that the test detects in at least 80% of samples; inf where there is none.

    The test rejects for D above sqrt(-ln(level / 2) / 2) (1/n + 1/m)^(1/2) (Smirnov 1948). At the value where the true
    distributions differ most, the difference of the observed shares has a standard deviation of at most half of that
    root. So the normal quantile of the power times this deviation is added.
    """
    if not rows.old or not rows.new:
        return math.inf
    if rows.share is not None:
        return _detectable_share(rows, level)
    return (math.sqrt(-math.log(level / 2) / 2) + _quantile(POWER) / 2) * math.sqrt(1 / rows.old + 1 / rows.new)


def required_rows(rows: Rows, level: float, distance: float) -> int | None:
    """Return the number of new rows that detects this distance, or None above MOST_ROWS.

    Where there are fewer old rows, their number is assumed to be the same. The search halves the interval.
    """
    low, high = 0, MOST_ROWS
    if detectable_distance(replace(rows, old=max(rows.old, high), new=high), level) > distance:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = detectable_distance(replace(rows, old=max(rows.old, middle), new=middle), level) <= distance
        low, high = (low, middle) if enough else (middle, high)
    return high


def _detectable_share(rows: Rows, level: float) -> float:
    """Return the smallest d with d >= z_level sd(no difference) + z_power sd(difference d) + (1/n + 1/m) / 2.

    This is the normal approximation for two shares, with the continuity correction that an exact test needs (Fleiss,
    Levin and Paik 2003, section 4.2). The difference is taken towards one half, where shares vary most.
    """
    assert rows.share is not None
    n, m, old = rows.old, rows.new, min(rows.share, 1 - rows.share)
    new, size = np.linspace(old, 1, SHARES), 1 / n + 1 / m
    pooled = (n * old + m * new) / (n + m)
    null = _quantile(1 - level / 2) * np.sqrt(pooled * (1 - pooled) * size)
    alternative = _quantile(POWER) * np.sqrt(old * (1 - old) / n + new * (1 - new) / m)
    enough = np.flatnonzero(new - old >= null + alternative + size / 2)
    return float(new[enough[0]] - old) if len(enough) else math.inf


def difference_interval(old: Numbers, new: Numbers, seed: int) -> tuple[float, float]:
    """Compute the 95% percentile bootstrap interval of mean(new) - mean(old) (Efron 1979)."""
    random = np.random.default_rng(seed)
    means = []
    for values in (old[np.isfinite(old)], new[np.isfinite(new)]):
        if not len(values):
            return math.nan, math.nan
        means.append(draw_counts(random, len(values), RESAMPLES) @ values / len(values))
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return float(low), float(high)
