"""Whether an update may be taken. Nothing that is not finite ever reaches weights or moments."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from keel.errors import Diverged

MEMORY = 100  # updates over which the mean norm of a gradient is taken
FIRST = 10  # updates before any counts as a jump


@dataclass
class Guard:
    """Refuses updates with numbers that are not finite and, if asked to, those whose gradient jumps."""

    on_fault: str = "stop"  # or skip
    max_skips: int = 3
    spike: float | None = None
    skipped: int = 0  # in a row, until now
    means: dict[str, float] = field(default_factory=dict)  # of each model's norms so far
    counts: dict[str, int] = field(default_factory=dict)

    def admits(self, norms: Mapping[str, float], fault: str | None = None) -> bool:
        """True to take the update, False to skip it. Raises Diverged when a fault stops the run."""
        fault = fault or self._jump(norms)
        if fault is None:
            self.skipped = 0
            self._remember(norms)
            return True
        if self.on_fault == "stop":
            raise Diverged(fault, fix="lower optim.learning_rate, look at the rewards, or set optim.on_fault: skip")
        self.skipped += 1
        if self.skipped > self.max_skips:
            raise Diverged(
                f"{self.skipped} updates in a row went wrong, the last: {fault}", fix="lower optim.learning_rate"
            )
        return False

    def counters(self) -> dict[str, Any]:
        """What a checkpoint has to keep of it."""
        return {"skipped": self.skipped, "means": dict(self.means), "counts": dict(self.counts)}

    def restore(self, counters: Mapping[str, Any]) -> None:
        self.skipped, self.means, self.counts = counters["skipped"], counters["means"], counters["counts"]

    def _jump(self, norms: Mapping[str, float]) -> str | None:
        for name, norm in norms.items():
            mean = self.means.get(name, 0.0)
            if self.spike is not None and self.counts.get(name, 0) >= FIRST and norm > self.spike * mean:
                return f"the norm of the {name}'s gradient jumped to {norm:.3g} from {mean:.3g} on average"
        return None

    def _remember(self, norms: Mapping[str, float]) -> None:
        for name, norm in norms.items():
            count = self.counts[name] = min(MEMORY, self.counts.get(name, 0) + 1)
            mean = self.means.get(name, 0.0)
            self.means[name] = mean + (norm - mean) / count


def require_finite(weights: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raises Diverged instead of a checkpoint from which no run can go on."""
    bad = next((name for name, value in weights if not bool(value.isfinite().all())), None)
    if bad is not None:
        raise Diverged(f"weight {bad} is not finite after step {step}", fix="lower optim.learning_rate")


def find_fault(
    losses_finite: bool, norms: Mapping[str, float], parameters: Iterable[tuple[str, nn.Parameter]]
) -> str | None:
    """What is not finite in an update, by name; None if all is well. The named parameters hold the gradients."""
    if not losses_finite:
        return "the loss is not finite"
    if all(math.isfinite(norm) for norm in norms.values()):
        return None
    graded = ((name, parameter.grad) for name, parameter in parameters if parameter.grad is not None)
    bad = next((name for name, gradient in graded if not bool(gradient.isfinite().all())), None)
    return f"the gradient of {bad} is not finite" if bad else "the gradient's norm is not finite"
