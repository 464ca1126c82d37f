"""Figures that tell how an update went."""

import torch
from torch import Tensor

from keel.core.losses import likelihood_ratio
from keel.core.masked import check_shapes, masked_mean, masked_var


def approx_kl(new_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """ratio - 1 - log ratio per token, never negative; its mean is `policy/approx_kl` (new against sampling policy)."""
    check_shapes(new_logprobs, logprobs)
    return likelihood_ratio(new_logprobs, logprobs) - 1 - (new_logprobs - logprobs)


def clipfrac(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, clip_range_low: float, clip_range_high: float
) -> Tensor:
    """1 where the clipped term is the one used (the token has no gradient), else 0; its mean is `policy/clipfrac`."""
    check_shapes(new_logprobs, logprobs, advantages)
    ratio = likelihood_ratio(new_logprobs, logprobs)
    above = (ratio > 1.0 + clip_range_high) & (advantages > 0)
    below = (ratio < 1.0 - clip_range_low) & (advantages < 0)
    return (above | below).to(ratio.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over counted tokens.

    1: the critic foresees the returns; 0: no better than a constant; below 0: worse than a constant.
    NaN when the returns do not vary, for then there is nothing to explain.
    """
    check_shapes(values, returns, mask)
    variance = masked_var(returns, mask)
    if variance == 0:
        return torch.full_like(masked_mean(returns, mask), torch.nan)
    return 1 - masked_var(returns - values, mask) / variance
