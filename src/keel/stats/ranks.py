"""Ranks of values among each other."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def mean_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the rank of each value, from 1 for the lowest; equal values share the mean of their ranks. [N] -> [N]

    Values that are not finite get NaN and do not count. Spearman's correlation is Pearson's of these ranks.
    """
    ranks = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    _, inverse, counts = np.unique(values[finite], return_inverse=True, return_counts=True)
    ranks[finite] = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return ranks
