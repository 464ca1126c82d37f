"""Losses that learn from human comparisons."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from keel.core.masked import check_shapes


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigma(chosen - rejected - margin), per pair. [N], [N] -> [N]

    Bradley and Terry 1952; the margin as in Llama 2 (Touvron et al. 2023, equation 2).
    """
    check_shapes(chosen, rejected, *([] if margin is None else [margin]))
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return softplus(-difference)


def plackett_luce_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """-log P(ranking) = sum_k [logsumexp(s_k..s_K) - s_k]; scores [N, K] are ordered best first. -> [N]

    Plackett 1975. Masked entries do not take part; two entries give the Bradley-Terry loss.
    """
    check_shapes(scores, mask)
    filled = scores.masked_fill(~mask, -torch.inf)
    remaining = filled.flip(1).logcumsumexp(1).flip(1)
    return torch.where(mask, remaining - scores, 0.0).sum(1)


def tied_plackett_luce_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """-log of the probability, under Plackett-Luce, of all orders that agree with `ranks`. [N, K] each -> [N]

    Rank 1 is best and equal ranks tie: a tie says that the order is not known, not that the answers are equally good,
    so the probabilities of its orders are added. Masked entries do not take part; without ties this is
    `plackett_luce_loss`, and a tie at the very end adds nothing (as in pairs, where ties give none).

    Plackett-Luce is a race in which entry i arrives at rate exp(s_i), so a tied block B arrives before the rest, whose
    rates sum to 1, with probability integral of e^-t prod_B (1 - e^(-t e^(s_i))) dt (DeLong, Guirguis and So 1994).
    With t = e^x the trapezoidal rule below is exact to rounding: the integrand is analytic and decays at both ends.
    """
    check_shapes(scores, ranks, mask)
    both = mask.unsqueeze(1) & mask.unsqueeze(2)
    behind = both & (ranks.unsqueeze(1) > ranks.unsqueeze(2))  # [N, i, j]: j comes after i
    tied = both & (ranks.unsqueeze(1) == ranks.unsqueeze(2))
    counted = behind.any(2)  # [N, i]: not in the last block
    rest = torch.where(behind, scores.unsqueeze(1), -torch.inf).masked_fill(~counted.unsqueeze(2), 0.0).logsumexp(2)
    x = torch.arange(-36.0, 6.0, 0.125, dtype=scores.dtype, device=scores.device)
    z = torch.where(counted, scores - rest, 0.0).unsqueeze(2) + x  # log of t e^(s_i)
    exact = torch.log(-torch.expm1(-z.clamp(-30.0, 6.0).exp()))  # log(1 - e^-y) of y = e^z, which is z for tiny y
    arrived = torch.where(z < -30.0, z, exact)
    block = tied.to(scores.dtype) @ arrived  # [N, i, x]: summed over the block of i
    log_probability = (block + x - x.exp()).logsumexp(2) + math.log(0.125)
    return -torch.where(counted, log_probability / tied.sum(2).clamp(min=1), 0.0).sum(1)


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log sigma(beta h) - e log sigma(-beta h), h = difference of the answers' log-ratios. [N] each -> [N]

    Log-probabilities are sums over an answer's tokens. Rafailov et al. 2023, equation 7; e > 0: conservative DPO.
    """
    check_shapes(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)
