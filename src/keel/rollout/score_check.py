"""Validate the output of a scorer. A value that is not a score is a failure and never becomes a number."""

import math
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from keel.data.batches import Rollouts
from keel.errors import RewardError

LARGEST = 1e9
"""Larger scores are refused as mistakes; they could also overflow in means and variances."""


@dataclass(frozen=True)
class NoScore:
    """The scorer's value for a sample is not a score."""

    reason: str


Score = float | None | list[float] | list[tuple[str, float]] | NoScore
"""A score of the response; None = not applicable; one score per segment; (segment text, score) pairs; or a failure."""


def check_scores(rewards: Any, rollouts: Rollouts, where: str) -> list[Score]:
    """Return the output of a scorer as one score per sample. Raises RewardError unless it is a list of that length."""
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple):
        raise RewardError(f"expected a list of rewards, got {type(rewards).__name__}", where=where)
    if len(rewards) != len(rollouts.texts):
        raise RewardError(f"expected {len(rollouts.texts)} rewards, got {len(rewards)}", where=where)
    return [_check_score(reward) for reward in rewards]


def _check_score(reward: Any) -> Score:
    if hasattr(reward, "tolist"):
        reward = reward.tolist()
    if reward is None:
        return None
    try:
        if not isinstance(reward, list | tuple):
            return _number(reward)
        if reward and all(isinstance(segment, list | tuple) and len(segment) == 2 for segment in reward):
            return [(str(text), _number(value)) for text, value in reward]
        return [_number(segment) for segment in reward]
    except ValueError as error:
        return NoScore(str(error))


def _number(value: Any) -> float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise ValueError(f"reward {value!r} is not a finite number")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"reward {str(value)[:40]} is not a finite number")
    if abs(number) > LARGEST:
        raise ValueError(f"reward {number!r} is beyond {LARGEST:g}")
    return number
