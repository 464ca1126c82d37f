"""The bootstrap over items: how far a figure would move had other items been drawn."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DRAWS = 1000
"""Bootstrap samples of the items."""
MOST_UNITS = 5_000
"""Of more items, the bootstrap draws groups of so many in all: its time and memory no longer grow with the items."""


@dataclass(frozen=True)
class Resamples:
    """Bootstrap samples of I items in U units: each item is a unit or, of very many, belongs to one."""

    units: Array  # [I]
    drawn: Array  # [DRAWS, U], how often each unit is in each sample

    @classmethod
    def draw(cls, items: int) -> "Resamples":
        draw, count = np.random.default_rng(0), min(items, MOST_UNITS)
        drawn = draw.multinomial(count, np.full(count, 1 / count), DRAWS) if count else np.empty((DRAWS, 0))
        return cls(np.arange(items) % max(count, 1), drawn.astype(float))

    def sums(self, values: Array) -> Array:
        """Of values of the items, in each sample. [I, F] -> [DRAWS, F]"""
        columns = [np.bincount(self.units, column, self.drawn.shape[1]) for column in values.T]
        return self.drawn @ np.stack(columns, 1)
