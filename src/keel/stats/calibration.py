"""How far stated probabilities are from observed shares, without the bias of the plug-in estimate."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel.stats.intervals import Interval, Numbers, Z

NUM_BINS = 10
PER_BIN = 20  # observations that a bin needs; with fewer there are fewer bins


@dataclass(frozen=True)
class SquaredGap:
    """Debiased mean square of share - confidence over bins.

    The estimate for a true value r^2 has the variance `base` + `slope` r^2, that of noncentral chi-squares.
    """

    mean: float
    base: float
    slope: float

    @property
    def root(self) -> float:
        """0 where noise explains all of it."""
        return math.sqrt(max(self.mean, 0.0))

    @property
    def interval(self) -> Interval:
        """95% interval of the root: the r with (r^2 - mean)^2 = z^2 (base + slope r^2), as Wilson 1927 for a share."""
        middle = self.mean + Z**2 * self.slope / 2
        half = math.sqrt(max(middle**2 - self.mean**2 + Z**2 * self.base, 0.0))
        return math.sqrt(max(middle - half, 0.0)), math.sqrt(min(max(middle + half, 0.0), 1.0))


def squared_gap(confidence: Numbers, outcomes: Numbers, weights: Numbers, clusters: NDArray[np.int64]) -> SquaredGap:
    """Estimate the squared calibration error over bins of equally many observations. [M], [M], [M], [M]

    The plug-in square counts the noise of each bin's share as miscalibration; its variance is subtracted (Kumar, Liang
    and Ma 2019, "Verified uncertainty calibration"), here with the observations of a cluster as dependent. The variance
    cannot be known where one cluster fills a bin; nothing is subtracted there.
    """
    order = np.argsort(confidence, kind="stable")
    count = min(NUM_BINS, max(1, len(order) // PER_BIN))
    mean = base = slope = 0.0
    for rows in np.array_split(order, count):
        share = float(weights[rows].sum())
        if not share:
            continue
        gaps, own = (outcomes - confidence)[rows], weights[rows] / share
        gap = float(own @ gaps)
        numbers = np.unique(clusters[rows], return_inverse=True)[1]
        sums = np.bincount(numbers, own * (gaps - gap))
        variance = float(sums @ sums) * len(sums) / (len(sums) - 1) if len(sums) > 1 else 0.0
        mean += share * (gap**2 - variance)
        base += 2 * (share * variance) ** 2
        slope += 4 * share**2 * variance
    return SquaredGap(mean, base, slope)
