"""The calibration error: the gap between stated probabilities and observed shares, debiased."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel.stats.intervals import Interval, Numbers, Z

NUM_BINS = 10
PER_BIN = 20  # observations that a bin needs; less data makes fewer bins


@dataclass(frozen=True)
class SquaredGap:
    """Debiased mean over bins of (observed share - stated confidence)^2.

    For a true value r^2, the estimate has the variance `base` + `slope` r^2, as a sum of noncentral chi-squares has.
    """

    mean: float
    base: float
    slope: float

    @property
    def root(self) -> float:
        """The root mean square gap; 0 where noise explains the entire gap."""
        return math.sqrt(max(self.mean, 0.0))

    @property
    def interval(self) -> Interval:
        """95% interval of the root: both r with (r^2 - mean)^2 = z^2 (base + slope r^2), as in Wilson 1927."""
        middle = self.mean + Z**2 * self.slope / 2
        half = math.sqrt(max(middle**2 - self.mean**2 + Z**2 * self.base, 0.0))
        return math.sqrt(max(middle - half, 0.0)), math.sqrt(min(max(middle + half, 0.0), 1.0))


def squared_gap(confidence: Numbers, outcomes: Numbers, weights: Numbers, clusters: NDArray[np.int64]) -> SquaredGap:
    """Estimate the squared calibration error over bins of equally many observations. [M], [M], [M], [M]

    The plug-in estimate counts the noise of each bin's share as miscalibration. So the variance of that share is
    subtracted (Kumar, Liang and Ma 2019, "Verified uncertainty calibration"). Observations of one cluster are treated
    as dependent. A bin that one cluster fills has no known variance, and nothing is subtracted there.
    """
    order = np.argsort(confidence, kind="stable")
    count = min(NUM_BINS, max(1, len(order) // PER_BIN))
    mean = base = slope = 0.0
    for rows in np.array_split(order, count):
        share = float(weights[rows].sum())
        if not share:
            continue
        gaps, bin_weights = (outcomes - confidence)[rows], weights[rows] / share
        gap = float(bin_weights @ gaps)
        numbers = np.unique(clusters[rows], return_inverse=True)[1]
        sums = np.bincount(numbers, bin_weights * (gaps - gap))
        variance = float(sums @ sums) * len(sums) / (len(sums) - 1) if len(sums) > 1 else 0.0
        mean += share * (gap**2 - variance)
        base += 2 * (share * variance) ** 2
        slope += 4 * share**2 * variance
    return SquaredGap(mean, base, slope)
