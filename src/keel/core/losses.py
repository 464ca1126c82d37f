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


def clipped_weight_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, clip_range_low: float, clip_range_high: float
) -> Tensor:
    """Compute CISPO's -clip(ratio, 1 - low, 1 + high) A_t log pi(y_t | s_t), without a gradient of the clipped ratio.

    MiniMax 2025 (MiniMax-M1, arXiv 2506.13585), equations 4 and 5. PPO's clip removes the gradient of a token outside
    the range; here only its weight is limited. The paper has no lower limit, which is `clip_range_low` 1.
    """
    check_shapes(new_logprobs, logprobs, advantages)
    ratio = likelihood_ratio(new_logprobs, logprobs).detach()
    return -ratio.clamp(1.0 - clip_range_low, 1.0 + clip_range_high) * advantages * new_logprobs


def sequence_level_logprobs(new_logprobs: Tensor, logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Return the log-probs to which the ratio of every token is that of its response, s = exp(mean of log-ratios).

    GSPO (Zheng et al. 2025, arXiv 2507.18071): s_i = (pi(y_i | x) / pi_sampled(y_i | x))^(1 / T_i), equation 7. The
    ratio of a token to the result has the value s_i and the gradient s_i grad log pi(y_t | s_t). This is GSPO-token
    (equations 13 and 14), which is GSPO if all tokens of a response have the same advantage.

    Args:
        new_logprobs: of the counted tokens, [N]; `logprobs` as well.
        response_mask: [B, T], the counted tokens.
    """
    check_shapes(new_logprobs, logprobs)
    lengths = response_mask.sum(1)
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    log_ratios = (new_logprobs - logprobs).detach()
    means = log_ratios.new_zeros(len(lengths)).index_add(0, rows, log_ratios) / lengths.clamp(min=1)
    return new_logprobs.detach() - means[rows]


def aggregation_weights(
    response_mask: Tensor, loss_aggregation: str, num_tokens: float, num_responses: float, max_tokens: int
) -> Tensor:
    """Return the weights of the counted tokens with which a mean over tokens is the aggregation. [B, T] -> [N], float64

    token: the mean over tokens (DAPO, Yu et al. 2025, equation 8). sequence: the mean of each response, then the mean
    over responses (GRPO, Shao et al. 2024, equation 3). constant: the sum, divided by the number of responses times the
    length limit (Dr.GRPO, Liu et al. 2025, section 3.2 and its listing 1).

    Args:
        num_tokens: counted tokens of the full optimizer step, over all micro-batches and ranks.
        num_responses: responses with a counted token, counted as far.
        max_tokens: length limit of a response.
    """
    lengths = response_mask.sum(1)
    if loss_aggregation == "sequence":
        divisors = num_responses * lengths.double()
    elif loss_aggregation == "constant":
        divisors = torch.full_like(lengths, num_responses * max_tokens, dtype=torch.float64)
    else:
        divisors = torch.full_like(lengths, num_tokens, dtype=torch.float64)
    return (num_tokens / divisors).repeat_interleave(lengths)


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
