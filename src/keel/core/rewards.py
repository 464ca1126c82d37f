"""From scores of responses to rewards of tokens."""

import torch
from torch import Tensor

from keel.core.masked import check_shapes, last_counted_index, zero_outside


def place_scores(scores: Tensor, response_mask: Tensor) -> Tensor:
    """Put each response's score on its last counted token, with zeros elsewhere. [B], [B, T] -> [B, T]"""
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(f"{tuple(scores.shape)} scores for {response_mask.shape[0]} responses")
    placed = torch.zeros(response_mask.shape, dtype=scores.dtype, device=scores.device)
    return placed.scatter(1, last_counted_index(response_mask).unsqueeze(1), scores.unsqueeze(1))


def overlong_penalties(lengths: Tensor, max_tokens: int, soft_tokens: int) -> Tensor:
    """Return the share of the last `soft_tokens` tokens before the length limit that each response uses, 0 to 1. [B]

    DAPO's soft overlong punishment (Yu et al. 2025, equation 13) is minus this share: 0 up to max_tokens - soft_tokens,
    then falling linearly to -1 at max_tokens. Zeros if `soft_tokens` is 0.
    """
    if soft_tokens == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((lengths - (max_tokens - soft_tokens)) / soft_tokens).clamp(0.0, 1.0)


def token_rewards(token_scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Compute r_t = score_t - kl_coef * kl_t, with zeros outside the mask. [B, T] each -> [B, T]

    `place_scores` gives the token scores of scores of responses. Ziegler et al. 2019, equation 2.
    """
    check_shapes(token_scores, kl, response_mask)
    return zero_outside(token_scores - kl_coef * kl, response_mask)
