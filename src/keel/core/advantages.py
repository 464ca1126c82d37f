"""Who deserves the reward: from rewards of tokens (or scores of answers) to advantages."""

import torch
from torch import Tensor

from keel.core.masked import check_shapes, zero_outside

ROUNDING = 1e-6
"""Differences of scores below this share of the largest score are rounding: 16 units in the last place of float32,
about what a network's score of one and the same text varies by from batch to batch."""


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016). [B, T] each -> advantages, returns [B, T]

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  returns = A + V.
    V after a row's last counted token is 0, or `bootstrap_values` [B]. Masked places are stepped over: the token
    before a gap is followed by the token after it. lambda = 0 is the one-step advantage of A2C.
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
    """Reward to go: R_t = r_t + gamma R_{t+1} (Williams 1992). [B, T] -> [B, T]"""
    return gae(rewards, torch.zeros_like(rewards), response_mask, gamma, 1.0)[0]


def rloo(scores: Tensor, group_size: int) -> Tensor:
    """Score minus the mean of the others in its group: r_i - mean_{j != i} r_j. [B] -> [B]

    Rows of one group are adjacent. An unbiased policy gradient (Kool et al. 2019; Ahmadian et al. 2024).
    """
    groups = _grouped(scores, group_size)
    baseline = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - baseline).reshape(-1)


def grpo(scores: Tensor, group_size: int, normalize_std: bool = True) -> Tensor:
    """Score minus the group's mean, divided by its standard deviation (unbiased, + 1e-6) if asked for. [B] -> [B]

    Rows of one group are adjacent. Scores that differ by no more than rounding give exact zeros. Shao et al. 2024;
    without the division: the advantage of Dr.GRPO (Liu et al. 2025), which also divides the loss by a constant length.
    """
    groups = _grouped(scores, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if normalize_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-6)
    return centred.reshape(-1)


def group_deviations(scores: Tensor, group_size: int) -> Tensor:
    """Return the standard deviation (unbiased) of each group's scores, 0 where they are equal. [B] -> [B / G]"""
    return _grouped(scores, group_size).std(dim=1)


def equal_groups(scores: Tensor, group_size: int) -> Tensor:
    """Return whether the scores of each group differ by no more than rounding. [B] -> [B / group_size] bool"""
    groups = scores.view(-1, group_size)
    return groups.amax(1) - groups.amin(1) <= ROUNDING * groups.abs().amax(1)


def _grouped(scores: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"a group baseline needs group_size >= 2, got {group_size}")
    if scores.dim() != 1 or scores.shape[0] % group_size:
        raise ValueError(f"scores {tuple(scores.shape)} do not divide into groups of {group_size}")
    groups = scores.view(-1, group_size)
    shifted = groups - groups[:, :1]  # changes no advantage, and keeps digits where scores are large
    return shifted.masked_fill(equal_groups(scores, group_size).unsqueeze(1), 0.0)
