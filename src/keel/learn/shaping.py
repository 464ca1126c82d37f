"""From what scorers said to what the policy is paid: normalisation, limits, the penalty for a missing end."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.core.rewards import place_scores
from keel.data.batches import ScoredRollouts
from keel.world import World


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and variance of the scores so far (Chan et al.'s update)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """1 when the scores do not differ by more than rounding: then there is no scale to divide by."""
        spread = math.sqrt(self.squares / self.count) if self.count > 1 else 0.0
        return spread if spread > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    def plus(self, scores: Tensor, world: World) -> "ScoreStatistics":
        """Those with a batch of scores [B] more, of all ranks together."""
        scores = world.gather(scores.double())
        scores = scores[scores.isfinite()]
        count, mean = len(scores), float(scores.mean())
        if count == 0:
            return self
        shift, total = mean - self.mean, self.count + count
        squares = self.squares + float(((scores - mean) ** 2).sum()) + shift**2 * self.count * count / total
        return ScoreStatistics(total, self.mean + shift * count / total, squares)


@dataclass(frozen=True)
class Shaping:
    missing_eos_penalty: float
    clip: float | None
    normalize: str  # none, reference, running

    def token_scores(self, scored: ScoredRollouts, statistics: ScoreStatistics) -> Tensor:
        """Shaped scores [B, T]: segments keep their places and share the scale; every other change of the answer's
        score (offset, limit, penalty) stands on its last token."""
        mask = scored.rollouts.response_mask
        mean, std = (0.0, 1.0) if self.normalize == "none" else (statistics.mean, statistics.std)
        scores = (scored.scores - mean) / std
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        scores = scores - self.missing_eos_penalty * scored.rollouts.truncated
        if scored.segment_scores is None:
            return place_scores(scores, mask)
        placed = scored.segment_scores / std
        return placed + place_scores(scores - placed.sum(1), mask)


def kept_scores(scored: ScoredRollouts) -> Tensor:
    """Scores [B] with NaN for dropped responses."""
    return torch.where(scored.kept, scored.scores, torch.nan)
