"""Runs of the base with changes."""

import math
from pathlib import Path
from typing import Any

from ..runs import lines, train

Metrics = list[dict[str, Any]]


CORRELATIONS = ("response/length_correlation", "agreement/", "credit/")


class Runner:
    """Runs the base with changes; every figure of every run must be finite."""

    def __init__(self, model: Path, output: Path) -> None:
        self.model, self.output = model, output

    def __call__(self, changes: dict[str, Any], **arguments: Any) -> Metrics:
        metrics = train(self.model, self.output, {"log.rollouts_per_step": 16, **changes}, **arguments)
        for line in metrics:
            for name, value in line.items():
                if value is None and name.startswith(CORRELATIONS):
                    continue  # of what does not vary there is none
                assert value is not None, name
                assert math.isfinite(value), name
        return metrics

    def rewards(self, step: int = 1) -> list[float]:
        """Sum of the token rewards of each of the step's answers. In the first step there is no KL."""
        answers = lines(self.output / "rollouts.jsonl")
        return [sum(answer["rewards"]) for answer in answers if answer["step"] == step]

    def answers(self, step: int = 1) -> list[dict[str, Any]]:
        return [answer for answer in lines(self.output / "rollouts.jsonl") if answer["step"] == step]
