"""Credit assignment: from rewards of tokens, or scores of responses, to advantages."""

import torch
from torch import Tensor

from keel.core.masked import ROUNDING, check_shapes, zero_outside


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates (Schulman et al. 2016). [B, T] each -> advantages, returns [B, T]

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  returns = A + V.
    Masked positions are skipped: t + 1 is the next counted token. lambda = 0 gives the one-step advantage of A2C.

    Args:
        bootstrap_values: [B], V after each row's last counted token; 0 by default.
    """
    check_shapes(rewards, values, response_mask)
    rewards, values = zero_outside(rewards, response_mask), zero_outside(values, response_mask)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap_values is None else bootstrap_values.to(values.dtype)
    check_shapes(next_value, values[:, 0])
    advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        counted = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(counted, delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(counted, values[:, t], next_value)
        columns.append(advantage)
    advantages = zero_outside(torch.stack(columns[::-1], dim=1), response_mask)
    return advantages, advantages + values


def discounted_returns(rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """Compute the reward to go, R_t = r_t + gamma R_{t+1} (Williams 1992). [B, T] -> [B, T]"""
    return gae(rewards, torch.zeros_like(rewards), response_mask, gamma, 1.0)[0]


def rloo(scores: Tensor, group_size: int) -> Tensor:
    """Return each score minus the mean of the others in its group, r_i - mean_{j != i} r_j. [B] -> [B]

    The rows of a group are adjacent. The policy gradient is unbiased (Kool et al. 2019; Ahmadian et al. 2024).
    """
    groups = _grouped(scores, group_size)
    baseline = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - baseline).reshape(-1)


def grpo(scores: Tensor, group_size: int, normalize_std: bool = True) -> Tensor:
    """Return each score minus its group's mean, over the group's unbiased standard deviation + 1e-6. [B] -> [B]

    The rows of a group are adjacent. Scores that differ by rounding only give exact zeros. Shao et al. 2024.

    Args:
        normalize_std: False leaves out the division. This is the advantage of Dr.GRPO (Liu et al. 2025), which also
            divides the loss by a constant length.
    """
    groups = _grouped(scores, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if normalize_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-6)
    return centred.reshape(-1)


def group_deviations(scores: Tensor, group_size: int) -> Tensor:
    """Return the unbiased standard deviation of each group's scores, 0 where they are equal. [B] -> [B / G]"""
    return _grouped(scores, group_size).std(dim=1)


def equal_groups(scores: Tensor, group_size: int) -> Tensor:
    """Return whether the scores of each group differ by rounding only. [B] -> [B / G] bool"""
    groups = scores.view(-1, group_size)
    return groups.amax(1) - groups.amin(1) <= ROUNDING * groups.abs().amax(1)


def _grouped(scores: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"a group baseline needs group_size >= 2, got {group_size}")
    if scores.dim() != 1 or scores.shape[0] % group_size:
        raise ValueError(f"scores {tuple(scores.shape)} do not divide into groups of {group_size}")
    groups = scores.view(-1, group_size)
    shifted = groups - groups[:, :1]  # changes no advantage, but keeps the digits of large scores
    return shifted.masked_fill(equal_groups(scores, group_size).unsqueeze(1), 0.0)
