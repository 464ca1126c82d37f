"""From scores of answers to rewards of tokens."""

import torch
from torch import Tensor

from keel.core.masked import check_shapes, last_counted_index, zero_outside


def place_scores(scores: Tensor, response_mask: Tensor) -> Tensor:
    """Each response's score on its last counted token, zeros elsewhere. [B], [B, T] -> [B, T]"""
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(f"{tuple(scores.shape)} scores for {response_mask.shape[0]} responses")
    placed = torch.zeros(response_mask.shape, dtype=scores.dtype, device=scores.device)
    return placed.scatter(1, last_counted_index(response_mask).unsqueeze(1), scores.unsqueeze(1))


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score. -> [B, T], zeros outside the mask

    `scores` is [B] (placed on the last counted token) or, for segment scores, already placed as [B, T].
    Ziegler et al. 2019, equation 2.
    """
    check_shapes(kl, response_mask)
    placed = place_scores(scores, response_mask) if scores.dim() == 1 else scores
    check_shapes(placed, response_mask)
    return zero_outside(placed - kl_coef * kl, response_mask)
