"""Score shaping: normalisation, clipping, and the penalty for a missing end token."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.core.rewards import overlong_penalties, place_scores
from keel.data.batches import ScoredRollouts
from keel.world import World


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and variance of all scores so far, updated batch by batch (Chan et al. 1983)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """Standard deviation; 1 if the scores differ by rounding only, since there is no scale to divide by."""
        spread = math.sqrt(self.squares / self.count) if self.count > 1 else 0.0
        return spread if spread > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    def plus(self, scores: Tensor, world: World) -> "ScoreStatistics":
        """Return the statistics with a batch of scores [B] added, from all ranks."""
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
    max_response_tokens: int = 0
    overlong_tokens: int = 0  # at the end of the limit, in which the penalty rises
    overlong_penalty: float = 0.0  # at the limit

    def token_scores(self, scored: ScoredRollouts, statistics: ScoreStatistics) -> Tensor:
        """Shape scores and put them on tokens. -> [B, T]

        Segment scores keep their tokens and are divided by the scale. Every other change of a response's score (offset,
        limit, penalty) is on its last token.
        """
        mask = scored.rollouts.response_mask
        mean, std = (0.0, 1.0) if self.normalize == "none" else (statistics.mean, statistics.std)
        scores = (scored.scores - mean) / std
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        scores = scores - self.missing_eos_penalty * scored.rollouts.truncated
        if self.overlong_tokens:
            lengths = scored.rollouts.lengths
            shares = overlong_penalties(lengths, self.max_response_tokens, self.overlong_tokens)
            scores = scores - self.overlong_penalty * shares
        if scored.segment_scores is None:
            return place_scores(scores, mask)
        placed = scored.segment_scores / std
        return placed + place_scores(scores - placed.sum(1), mask)


def kept_scores(scored: ScoredRollouts) -> Tensor:
    """Return the scores with NaN for dropped responses. [B]"""
    return torch.where(scored.kept, scored.scores, torch.nan)
