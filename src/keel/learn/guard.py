"""The check before each update. No number that is not finite reaches weights or optimizer moments."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from keel.errors import Diverged
from keel.shards import full_tensor

MEMORY = 100  # number of updates in the running mean of a gradient norm
FIRST = 10  # number of updates before a norm can count as a jump


@dataclass
class Guard:
    """Refuses updates with numbers that are not finite and, if `spike` is set, those whose gradient norm jumps."""

    on_fault: str = "stop"  # or "skip"
    max_skips: int = 3  # in a row
    spike: float | None = None  # a jump is a norm of more than this many times its mean
    skipped: dict[str, int] = field(default_factory=dict)  # updates of each model skipped in a row so far
    means: dict[str, float] = field(default_factory=dict)  # running mean of the gradient norm of each model
    counts: dict[str, int] = field(default_factory=dict)  # norms in each mean, at most MEMORY

    def admits(self, norms: Mapping[str, float], fault: str | None = None) -> bool:
        """Return whether to take the update rather than skip it. Raises Diverged when a fault stops the run.

        Args:
            norms: gradient norm of each model, by its name.
            fault: what is not finite, from `find_fault`.
        """
        fault, models = fault or self._jump(norms), " and ".join(norms)
        if fault is None:
            self.skipped[models] = 0
            self._remember(norms)
            return True
        if self.on_fault == "stop":
            raise Diverged(fault, fix="lower optim.learning_rate, check the rewards, or set optim.on_fault: skip")
        skipped = self.skipped[models] = self.skipped.get(models, 0) + 1
        if skipped > self.max_skips:
            raise Diverged(
                f"{skipped} updates in a row were faulty, the last one: {fault}", fix="lower optim.learning_rate"
            )
        return False

    def counters(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"skipped": dict(self.skipped), "means": dict(self.means), "counts": dict(self.counts)}

    def restore(self, counters: Mapping[str, Any]) -> None:
        self.skipped, self.means, self.counts = counters["skipped"], counters["means"], counters["counts"]

    def _jump(self, norms: Mapping[str, float]) -> str | None:
        for name, norm in norms.items():
            mean = self.means.get(name, 0.0)
            if self.spike is not None and self.counts.get(name, 0) >= FIRST and norm > self.spike * mean:
                return f"the gradient norm of the {name} jumped to {norm:.3g} from a mean of {mean:.3g}"
        return None

    def _remember(self, norms: Mapping[str, float]) -> None:
        for name, norm in norms.items():
            count = self.counts[name] = min(MEMORY, self.counts.get(name, 0) + 1)
            mean = self.means.get(name, 0.0)
            self.means[name] = mean + (norm - mean) / count


def all_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite, on all processes that hold a part of it."""
    return bool(full_tensor(tensor.detach().isfinite().all()))


def require_finite(weights: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raise Diverged if a weight is not finite: no run could resume from a checkpoint of it."""
    faulty = next((name for name, value in weights if not all_finite(value)), None)
    if faulty is not None:
        raise Diverged(f"weight {faulty} is not finite after step {step}", fix="lower optim.learning_rate")


def find_fault(
    losses_finite: bool, norms: Mapping[str, float], parameters: Iterable[tuple[str, nn.Parameter]]
) -> str | None:
    """Describe what is not finite in an update; None if all is finite.

    Args:
        norms: gradient norm of each model.
        parameters: named parameters, which hold the gradients.
    """
    if not losses_finite:
        return "the loss is not finite"
    if all(math.isfinite(norm) for norm in norms.values()):
        return None
    gradients = ((name, parameter.grad) for name, parameter in parameters if parameter.grad is not None)
    faulty = next((name for name, gradient in gradients if not all_finite(gradient)), None)
    # A norm may overflow although each entry of the gradient is finite.
    return f"the gradient of {faulty} is not finite" if faulty else "the gradient norm is not finite"
