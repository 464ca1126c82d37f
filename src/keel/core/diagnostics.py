"""Metrics that describe an update."""

import torch
from torch import Tensor

from keel.core.losses import likelihood_ratio
from keel.core.masked import AllSum, check_shapes, masked_moments, one_process


def approx_kl(new_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """Return ratio - 1 - log ratio per token, which is never negative.

    Its mean, `policy/approx_kl`, estimates the KL of the sampling policy from the new one.
    """
    check_shapes(new_logprobs, logprobs)
    return likelihood_ratio(new_logprobs, logprobs) - 1 - (new_logprobs - logprobs)


def clipfrac(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    clip_range_low: float,
    clip_range_high: float,
    by_weight: bool = False,
) -> Tensor:
    """Return 1 where the loss takes the clipped term, so that the token has no gradient, else 0.

    Its mean is `policy/clipfrac`.

    Args:
        by_weight: return 1 where the importance weight is limited, for either sign of the advantage (CISPO).
    """
    check_shapes(new_logprobs, logprobs, advantages)
    ratio = likelihood_ratio(new_logprobs, logprobs)
    above = (ratio > 1.0 + clip_range_high) & (by_weight | (advantages > 0))
    below = (ratio < 1.0 - clip_range_low) & (by_weight | (advantages < 0))
    return (above | below).to(ratio.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_sum: AllSum = one_process) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over the counted tokens of all ranks. []

    1: the critic predicts the returns exactly; 0: no better than a constant; below 0: worse than a constant.
    NaN if the returns do not vary, since there is nothing to explain.
    """
    check_shapes(values, returns, mask)
    _, variance = masked_moments(returns, mask, all_sum)
    _, unexplained = masked_moments(returns - values, mask, all_sum)
    return torch.where(variance > 0, 1 - unexplained / variance, torch.nan)
