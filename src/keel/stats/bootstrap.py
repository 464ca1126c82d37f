"""The bootstrap over items: how much a statistic varies from one sample of items to another."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DRAWS = 1000
"""Number of bootstrap samples."""
MOST_UNITS = 5_000
"""With more items than this, the bootstrap draws groups of items, so that time and memory stop growing."""


def draw_counts(random: np.random.Generator, count: int, draws: int) -> NDArray[np.int64]:
    """Return how often each of `count` units is in each of `draws` samples of as many, with replacement. [draws, count]

    Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    return random.multinomial(count, np.full(count, 1 / count), draws)


@dataclass(frozen=True)
class Resamples:
    """Bootstrap samples of I items in U units. A unit is one item or, with more than MOST_UNITS items, several."""

    units: Array  # [I], the unit of each item
    drawn: Array  # [DRAWS, U], how often each unit is in each sample

    @classmethod
    def draw(cls, items: int) -> "Resamples":
        """Draw the samples. The seed is fixed: the same items always get the same intervals."""
        count = min(items, MOST_UNITS)
        drawn = draw_counts(np.random.default_rng(0), count, DRAWS) if count else np.empty((DRAWS, 0))
        return cls(np.arange(items) % max(count, 1), drawn.astype(float))

    def sums(self, values: Array) -> Array:
        """Sum values of the items over each sample. [I, F] -> [DRAWS, F]"""
        columns = [np.bincount(self.units, column, self.drawn.shape[1]) for column in values.T]
        return self.drawn @ np.stack(columns, 1)
