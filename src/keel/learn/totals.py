"""Figures that are means: sums and counts are kept apart until the end, so that a mean of means never happens."""

from collections.abc import Iterable

import torch
from torch import Tensor

from keel.world import World


class Totals:
    """Sums and counts of named figures; means are taken once, over everything that was counted."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """`names` are figures that are there (as NaN) even when nothing of them was counted."""
        self.sums: dict[str, float] = dict.fromkeys(names, 0.0)
        self.counts: dict[str, int] = dict.fromkeys(names, 0)

    def add(self, name: str, values: Tensor) -> None:
        """A figure for each counted token."""
        self._add(name, float(values.detach().sum()), values.numel())

    def add_one(self, name: str, value: float) -> None:
        """A figure of one optimizer step."""
        self._add(name, value, 1)

    def merge(self, other: "Totals") -> None:
        for name, value in other.sums.items():
            self._add(name, value, other.counts[name])

    def reduce(self, world: World) -> dict[str, float]:
        """Means over everything counted on all ranks, which must hold the same names."""
        names = sorted(self.sums)
        pairs = torch.tensor([[self.sums[name], self.counts[name]] for name in names], dtype=torch.float64)
        pairs = world.sum(pairs.to(world.device) if world.size > 1 else pairs)
        return {name: float(total / count) for name, (total, count) in zip(names, pairs, strict=True)}

    def _add(self, name: str, value: float, count: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count
