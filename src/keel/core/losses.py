"""Losses per token, not reduced and not masked: [B, T] -> [B, T], or any other equal shapes.

The caller sums over the counted tokens and divides by their number in the full optimizer step.
"""

import torch
from torch import Tensor

from keel.core.masked import check_shapes


def policy_gradient_loss(new_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Compute -A_t log pi(y_t | s_t), whose gradient is minus the policy gradient (A2C, REINFORCE)."""
    check_shapes(new_logprobs, advantages)
    return -advantages * new_logprobs


def clipped_policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    clip_range_low: float,
    clip_range_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Compute PPO's -min(ratio A, clip(ratio, 1 - low, 1 + high) A), with ratio = exp(new_logprobs - logprobs).

    Schulman et al. 2017, equation 7. A ratio exactly at the edge of the range still has a gradient.

    Args:
        dual_clip: c bounds the loss by -c A where A < 0 (Ye et al. 2020).
    """
    check_shapes(new_logprobs, logprobs, advantages)
    ratio = likelihood_ratio(new_logprobs, logprobs)
    clipped = ratio.clamp(1.0 - clip_range_low, 1.0 + clip_range_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def likelihood_ratio(new_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """Compute exp(new_logprobs - logprobs), the exponent limited to +-60 so that the ratio is finite."""
    return torch.exp((new_logprobs - logprobs).clamp(-60.0, 60.0))


def truncated_importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, cap: float | None) -> Tensor:
    """Compute min(exp(logprobs - sampler_logprobs), cap) per token, without a gradient; ones without a cap.

    Where the sampler's policy differs from the trainer's, by rounding in 16 bits for example, a token's policy
    gradient times its ratio is the gradient of the trainer's policy. The cap bounds the variance that the ratios add
    (Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy training").
    """
    check_shapes(logprobs, sampler_logprobs)
    if cap is None:
        return torch.ones_like(logprobs)
    return likelihood_ratio(logprobs.detach(), sampler_logprobs.detach()).clamp(max=cap)


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, value_clip_range: float | None = None) -> Tensor:
    """Compute (V - R)^2 / 2 or, with a clip range, max((V - R)^2, (V_stored + clip(V - V_stored) - R)^2) / 2.

    The clipped form is that of Schulman et al.'s PPO code and of lm-human-preferences.
    """
    check_shapes(new_values, values, returns)
    loss = (new_values - returns) ** 2
    if value_clip_range is not None:
        near = values + (new_values - values).clamp(-value_clip_range, value_clip_range)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return loss / 2
