"""Metrics that are means. Sums and counts are kept separate until the end, so that no metric is a mean of means."""

from collections.abc import Iterable

import torch
from torch import Tensor

from keel.world import World


class Totals:
    """Sums and counts of named metrics. Means are taken once, over all counted values."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """Start with these metrics, which are NaN if nothing is added to them."""
        self.sums: dict[str, float] = dict.fromkeys(names, 0.0)
        self.counts: dict[str, int] = dict.fromkeys(names, 0)

    def add(self, name: str, values: Tensor) -> None:
        """Add one value per counted token or response."""
        self._add(name, float(values.detach().sum()), values.numel())

    def add_one(self, name: str, value: float) -> None:
        """Add a single value, such as one per optimizer step."""
        self._add(name, value, 1)

    def merge(self, other: "Totals") -> None:
        for name, value in other.sums.items():
            self._add(name, value, other.counts[name])

    def reduce(self, world: World) -> dict[str, float]:
        """Return the means over all ranks. Every rank must have the same names."""
        names = sorted(self.sums)
        pairs = torch.tensor([[self.sums[name], self.counts[name]] for name in names], dtype=torch.float64)
        pairs = world.sum(pairs.to(world.device) if world.size > 1 else pairs)
        return {name: float(total / count) for name, (total, count) in zip(names, pairs, strict=True)}

    def _add(self, name: str, value: float, count: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count
