"""Losses that learn from human comparisons."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.masked import check_shapes


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - e) log sigma(d) - e log sigma(-d), d = chosen - rejected - margin, per pair. [N], [N] -> [N]

    Bradley and Terry 1952; the margin as in Llama 2 (Touvron et al. 2023, equation 2). e is `label_smoothing`, the
    chance that a pair is the wrong way round (Mitchell 2023): the loss is least where sigma(d) = 1 - e.
    """
    check_shapes(chosen, rejected, *([] if margin is None else [margin]))
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return softplus(-difference) + label_smoothing * difference  # since softplus(d) = softplus(-d) + d


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


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """beta * (log pi(y|x) - log pi_ref(y|x)), from log-probabilities of whole answers. [N], [N] -> [N]

    The reward of which the policy is the optimum under beta * KL, up to a constant of the prompt, which no comparison
    sees (Rafailov et al. 2023, equation 5).
    """
    check_shapes(logprobs, ref_logprobs)
    return beta * (logprobs - ref_logprobs)


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The Bradley-Terry loss of the answers' implicit rewards. [N] each -> [N]

    Log-probabilities are sums over an answer's tokens. Rafailov et al. 2023, equation 7; with `label_smoothing` the
    conservative DPO of Mitchell 2023.
    """
    chosen = implicit_rewards(chosen_logprobs, ref_chosen_logprobs, beta)
    rejected = implicit_rewards(rejected_logprobs, ref_rejected_logprobs, beta)
    return bradley_terry_loss(chosen, rejected, label_smoothing=label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, h = (chosen - rejected) / beta, of the answers' implicit rewards. [N], [N] -> [N]

    h is the difference of the log-ratios log pi - log pi_ref, which are sums over an answer's tokens. Azar et al. 2023,
    equation 17, with beta for their tau: a pair that is always judged alike ends 1 / (2 beta) apart, and no further.
    """
    check_shapes(chosen, rejected)
    return ((chosen - rejected - 0.5) / beta) ** 2
