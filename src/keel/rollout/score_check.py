"""What a scorer may say. Nothing is ever turned into a number that a scorer did not say."""

import math
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from keel.data.batches import Rollouts
from keel.errors import RewardError

LARGEST = 1e9
"""A larger score is a mistake, or overflows on the way into means and variances."""


@dataclass(frozen=True)
class NoScore:
    """A scorer answered for this sample with something that is no score."""

    reason: str


Score = float | None | list[float] | list[tuple[str, float]] | NoScore
"""One score for the answer; None = not applicable; one per segment; (segment text, score) pairs; or a failure."""


def check_scores(answer: Any, rollouts: Rollouts, where: str) -> list[Score]:
    """A scorer's answer as one score a sample; RewardError unless it is a list of the right length."""
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        raise RewardError(f"expected a list of rewards, got {type(answer).__name__}", where=where)
    if len(answer) != len(rollouts.texts):
        raise RewardError(f"expected {len(rollouts.texts)} rewards, got {len(answer)}", where=where)
    return [_checked_score(score) for score in answer]


def _checked_score(score: Any) -> Score:
    if hasattr(score, "tolist"):
        score = score.tolist()
    if score is None:
        return None
    try:
        if not isinstance(score, list | tuple):
            return _number(score)
        if score and all(isinstance(part, list | tuple) and len(part) == 2 for part in score):
            return [(str(text), _number(value)) for text, value in score]
        return [_number(part) for part in score]
    except ValueError as error:
        return NoScore(str(error))


def _number(value: Any) -> float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise ValueError(f"reward {value!r} is no finite number")
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"reward {str(value)[:40]} is no finite number")
    if abs(number) > LARGEST:
        raise ValueError(f"reward {number!r} is beyond {LARGEST:g}")
    return number
