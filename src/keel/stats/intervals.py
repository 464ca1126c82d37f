"""95% confidence intervals of means and shares over clusters, such as prompts with several responses each.

Both kinds are intervals of a ratio sum(above) / sum(below), with one entry of each per cluster. The variance is
that of the linearized ratio. Small samples get the quantile of Student's t. `benchmarks/coverage.py` simulates how
often the intervals contain the true value.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Interval = tuple[float, float]
TAIL = 0.025
Z = 1.959964
MOST_EFFECTIVE = 1e6  # largest effective sample size; its intervals are already narrower than anybody needs


def mean_interval(above: Numbers, below: Numbers) -> Interval:
    """Return the interval of sum(above) / sum(below) from the entries of G clusters. [G], [G]

    Each end is the wider one of two: the t interval, and Hall's transformation, which corrects for skewness (Hall 1992,
    "On the removal of skewness by transformation", J. R. Statist. Soc. B 54, the cubic form). The interval of a single
    cluster is infinite, since its variance is unknown.
    """
    above, below = _counted(above, below)
    if len(below) < 2:
        return -math.inf, math.inf
    ratio, residuals, variance = _linearized(above, below)
    if variance == 0.0:
        return ratio, ratio
    quantile = t_quantile(_effective(below) - 1)
    count, deviation = len(below), math.sqrt(variance)
    skewness = float((residuals**3).mean() / (residuals**2).mean() ** 1.5)
    ends = [_hall(sign * quantile / math.sqrt(count), skewness, count) * math.sqrt(count) for sign in (1, -1)]
    low, high = (ratio - deviation * end for end in ends)
    return min(low, ratio - deviation * quantile), max(high, ratio + deviation * quantile)


def share_interval(above: Numbers, below: Numbers) -> Interval:
    """Return the interval of a share, sum(above) / sum(below) with 0 <= above <= below. [G], [G]

    The limits are those of Clopper and Pearson 1934 at the effective sample size (Korn and Graubard 1998, "Confidence
    intervals for proportions with small expected number of positive counts estimated from survey data"). Where all
    clusters agree, the variance is unknown. Then the share of clusters that 2.5% of samples would miss may be 0 or 1.
    """
    above, below = _counted(above, below)
    if not len(below):
        return 0.0, 1.0
    share, _, variance = _linearized(above, below)
    share, effective = min(max(share, 0.0), 1.0), _effective(below)
    if variance == 0.0:
        unseen = 1 - TAIL ** (1 / effective)
        return share * (1 - unseen), share + (1 - share) * unseen
    size = min(share * (1 - share) / variance, MOST_EFFECTIVE) * (Z / t_quantile(effective - 1)) ** 2
    hits, misses = share * size, (1 - share) * size
    return beta_quantile(TAIL, hits, misses + 1), beta_quantile(1 - TAIL, hits + 1, misses)


def _counted(above: Numbers, below: Numbers) -> tuple[Numbers, Numbers]:
    """Leave out clusters of weight zero."""
    return above[below > 0], below[below > 0]


def _linearized(above: Numbers, below: Numbers) -> tuple[float, Numbers, float]:
    """Return the ratio, the residual of each cluster and the ratio's variance (Cochran 1977, section 6.3).

    The variance is exactly 0 where the residuals are only rounding.
    """
    count, total = len(below), float(below.sum())
    ratio = float(above.sum()) / total
    residuals = above - ratio * below
    residuals = np.where(np.abs(residuals) <= 1e-12 * (np.abs(above) + abs(ratio) * below), 0.0, residuals)
    variance = float(residuals @ residuals) * count / max(count - 1, 1) / total**2
    return ratio, residuals, variance


def _effective(below: Numbers) -> float:
    """Return the effective sample size: the number of equally weighted clusters (Kish 1965). At least 1."""
    return max(1.0, float(below.sum() ** 2 / (below @ below)))


def _hall(t: float, skewness: float, count: int) -> float:
    """Invert t = x + g/3 x^2 + g^2/27 x^3 + g/(6n) for x, with g the skewness and n the count."""
    if abs(skewness) < 1e-6:  # the closed form divides by the skewness
        return t
    return 3 / skewness * (float(np.cbrt(1 + skewness * (t - skewness / (6 * count)))) - 1)


@lru_cache(maxsize=4096)
def t_quantile(degrees: float) -> float:
    """Return the 97.5% quantile of Student's t; fewer than one degree of freedom count as one."""
    degrees = max(1.0, degrees)
    x = beta_quantile(2 * TAIL, degrees / 2, 0.5)
    return math.sqrt(degrees * (1 - x) / x)


def beta_quantile(probability: float, a: float, b: float) -> float:
    """Return the quantile of the beta distribution. It is 0 for a = 0 and 1 for b = 0, as Clopper and Pearson need."""
    if a <= 0 or b <= 0:
        return 0.0 if a <= 0 else 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if incomplete_beta(middle, a, b) < probability else (low, middle)
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22)."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction of the other tail converges faster
        return 1 - incomplete_beta(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    d = 1 / (1 - (a + b) * x / (a + 1))
    c, value = 1.0, d
    for m in range(1, 5_000):
        change = 1.0
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + term * d), 1 + term / c
            change *= c * d
        value *= change
        if abs(change - 1) < 1e-12:
            break
    return math.exp(scale) * value / a
