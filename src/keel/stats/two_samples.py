"""Whether two samples are of one kind, how far apart they are, and whether there are enough of them to tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
DRAWS = 4_999
RESAMPLES = 2_000
AT_ONCE = 2**23  # numbers held in memory while permuting; no figure depends on it
POWER = 0.8  # how often a difference has to be found that is said to be detectable
SHARES = 2_001  # differences of two shares that are looked at, evenly spaced
MOST_ROWS = 1_000_000  # that anybody is told to collect
_quantile = NormalDist().inv_cdf


def distances(old: Numbers, new: Numbers, seed: int, draws: int = DRAWS) -> tuple[Numbers, Numbers]:
    """The Kolmogorov-Smirnov distance of each column, and the p-value of the permutation test with it.

    [n, F], [m, F] -> [F], [F]. The distance is the largest difference of the shares that lie below any one value, 0 to
    1; of yes-or-no figures it is the difference of the shares. The test asks how often a random division of all rows
    gives a distance as large, so that ties and few rows do no harm; rows without a figure (nan) are left out of it.
    Where no division does, e exp(-2 nm / (n + m) D^2) stands if it is less than so few divisions can say: the bound of
    Dvoretzky, Kiefer and Wolfowitz for two samples, with a constant that serves small ones (Wei and Dudley 2012).
    """
    both = np.concatenate([old, new])
    is_new = np.arange(len(both)) >= len(old)
    found = compute_distances(is_new[None, :], both)[0]
    random = np.random.default_rng(seed)
    at_least = np.zeros(both.shape[1])
    step = max(1, AT_ONCE // len(both))
    for start in range(0, draws, step):
        shuffled = random.permuted(np.tile(is_new, (min(step, draws - start), 1)), axis=1)
        at_least += (compute_distances(shuffled, both) >= found - 1e-12).sum(0)
    n, m = (np.isfinite(side).sum(0) for side in (old, new))
    tail = math.e * np.exp(-2 * n * m / np.maximum(n + m, 1) * found**2)
    p = (1 + at_least) / (1 + draws)
    return found, np.where(at_least == 0, np.minimum(p, tail), p)


def compute_distances(is_new: NDArray[np.bool_], values: Numbers) -> Numbers:
    """For each division of the rows [D, N] the distance of each column of values [N, F]. -> [D, F]"""
    found = np.zeros((len(is_new), values.shape[1]))
    for column, own in enumerate(values.T):
        known = np.flatnonzero(np.isfinite(own))
        order = known[np.argsort(own[known], kind="stable")]
        if not len(order):
            continue
        last = np.flatnonzero(np.append(own[order][1:] != own[order][:-1], True))  # of each run of equal values
        new = np.take(is_new, order, axis=1).cumsum(1, dtype=np.int32)  # up to each value, of the new ones and of all
        count, up_to = new[:, -1:], last + 1
        with np.errstate(divide="ignore", invalid="ignore"):  # a division may leave one side without rows
            apart = new[:, last] * (len(order) / (count * (len(order) - count))) - up_to / (len(order) - count)
        found[:, column] = np.nan_to_num(np.abs(apart).max(1), posinf=0.0)
    return found


def superiority(old: Numbers, new: Numbers) -> float:
    """How often a new value is above an old one, equal ones counting half (Vargha and Delaney 2000); 0.5: no shift."""
    old, new = np.sort(old[np.isfinite(old)]), new[np.isfinite(new)]
    if not len(old) or not len(new):
        return math.nan
    below, up_to = (np.searchsorted(old, new, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(old))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values for which the chance of any false alarm among all tests is at most the level (Holm 1979)."""
    order = np.argsort(p_values)
    raised = np.array(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(value) for value in result]


@dataclass(frozen=True)
class Rows:
    """How many rows a comparison has; `share` of the old ones, where the figure is yes or no."""

    old: int
    new: int
    share: float | None

    @classmethod
    def from_samples(cls, old: Numbers, new: Numbers) -> Self:
        """Rows without a figure (nan) do not count. The share has two successes and two failures added (Agresti and
        Coull 1998), so that none seen is not none at all."""
        old, new = old[np.isfinite(old)], new[np.isfinite(new)]
        yes_or_no = np.isin(np.concatenate([old, new]), (0.0, 1.0)).all()
        return cls(len(old), len(new), float((old.sum() + 2) / (len(old) + 4)) if yes_or_no else None)


def detectable(rows: Rows, level: float) -> float:
    """The distance that a test of so many rows at this level finds in at least 80% of samples; inf where none is.

    D exceeds the limit sqrt(-ln(level / 2) / 2) (1/n + 1/m)^(1/2) (Smirnov 1948) as often as the shares differ by it at
    the one value where the distributions are furthest apart; there the difference deviates by at most half of that
    root, so the normal quantile of the power times it is added.
    """
    if not rows.old or not rows.new:
        return math.inf
    if rows.share is not None:
        return _detectable_share(rows, level)
    return (math.sqrt(-math.log(level / 2) / 2) + _quantile(POWER) / 2) * math.sqrt(1 / rows.old + 1 / rows.new)


def required_rows(rows: Rows, level: float, distance: float) -> int | None:
    """How many new rows would find this distance, by halving; the old ones are as many where they are fewer.

    None: more than anybody collects.
    """
    low, high = 0, MOST_ROWS
    if detectable(replace(rows, old=max(rows.old, high), new=high), level) > distance:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = detectable(replace(rows, old=max(rows.old, middle), new=middle), level) <= distance
        low, high = (low, middle) if enough else (middle, high)
    return high


def _detectable_share(rows: Rows, level: float) -> float:
    """The least d for which d >= z_level sd(no difference) + z_power sd(difference d) + (1/n + 1/m) / 2: two shares by
    the normal form with the continuity correction that an exact test needs (Fleiss, Levin and Paik 2003, section 4.2).

    Towards one half, where shares vary most.
    """
    assert rows.share is not None
    n, m, old = rows.old, rows.new, min(rows.share, 1 - rows.share)
    new, size = np.linspace(old, 1, SHARES), 1 / n + 1 / m
    pooled = (n * old + m * new) / (n + m)
    none = _quantile(1 - level / 2) * np.sqrt(pooled * (1 - pooled) * size)
    some = _quantile(POWER) * np.sqrt(old * (1 - old) / n + new * (1 - new) / m)
    found = np.flatnonzero(new - old >= none + some + size / 2)
    return float(new[found[0]] - old) if len(found) else math.inf


def difference_interval(old: Numbers, new: Numbers, seed: int) -> tuple[float, float]:
    """95% interval of mean(new) - mean(old): percentiles over samples of both, drawn with replacement (Efron 1979)."""
    random = np.random.default_rng(seed)
    means = []
    for values in (old[np.isfinite(old)], new[np.isfinite(new)]):
        if not len(values):
            return math.nan, math.nan
        times = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
        means.append(times @ values / len(values))
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return float(low), float(high)
