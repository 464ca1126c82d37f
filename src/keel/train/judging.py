"""How good a reward model is on prompts it was not trained on, and what it takes to be that good."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from keel.core.preferences import bradley_terry_loss
from keel.data.preferences import Ranking

NUM_BINS = 10


def compare(scores: Sequence[Tensor], rankings: Sequence[Ranking]) -> dict[str, float]:
    """Figures over all pairs that were told apart; each ranking counts once, shared among its pairs.

    `scores` has those of each ranking's ranked answers, best first. accuracy: share of pairs in the right order (equal
    scores count half). loss: Bradley-Terry, in nats. calibration_error: see `calibration_error`. An empty dict without
    rankings.
    """
    if not rankings:
        return {}
    differences, weights = pair_differences(scores, rankings)
    accuracy = float(weights @ right(differences))
    return {
        "accuracy": accuracy,
        "loss": float(weights @ bradley_terry_loss(differences, torch.zeros_like(differences))),
        "calibration_error": calibration_error(differences, weights),
    }
