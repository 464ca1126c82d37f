"""Losses that learn from human comparisons."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.masked import check_shapes


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Compute -(1 - e) log sigma(d) - e log sigma(-d) per pair, d = chosen - rejected - margin. [N], [N] -> [N]

    Bradley and Terry 1952. The margin is that of Llama 2 (Touvron et al. 2023, equation 2).

    Args:
        label_smoothing: e, the probability that a pair's label is reversed (Mitchell 2023). The loss is smallest where
            sigma(d) = 1 - e.
    """
    check_shapes(chosen, rejected, *([] if margin is None else [margin]))
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return softplus(-difference) + label_smoothing * difference  # since softplus(d) = softplus(-d) + d


def plackett_luce_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Compute minus the log-probability, under Plackett-Luce, of all orders that agree with `ranks`. [N, K] -> [N]

    Rank 1 is best, and equal ranks tie. A tie means that the order is unknown, not that the responses are equally
    good, so the probabilities of its orders are added. A tie for the last rank adds nothing, as in pairs, where a tie
    gives no pair. Masked entries have no effect. Without ties this is the loss of Plackett 1975.

    Plackett-Luce is a race in which entry i arrives at rate exp(s_i). Scale the rates so that those of the entries
    behind a tied block B sum to 1. B then arrives before them with probability
    integral of e^-t prod_B (1 - e^(-t e^(s_i))) dt (DeLong, Guirguis and So 1994).
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
    """Compute beta * (log pi(y|x) - log pi_ref(y|x)) from log-probabilities summed over a response. [N], [N] -> [N]

    The policy is the optimum of this reward under beta * KL. The reward is known up to a constant per prompt, which
    cancels in every comparison (Rafailov et al. 2023, equation 5). DPO is the Bradley-Terry loss of implicit rewards
    (equation 7 there).
    """
    check_shapes(logprobs, ref_logprobs)
    return beta * (logprobs - ref_logprobs)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """Compute log(p / (1 - p)), p = exp(mean_logprobs), the geometric mean of the probabilities of a response's tokens.

    Hong et al. 2024 (ORPO), equation 4. p is at most 1 - 1e-6, so that the odds are finite.
    """
    bounded = mean_logprobs.clamp(max=-1e-6)
    return bounded - torch.log(-torch.expm1(bounded))


def odds_ratio_loss(chosen: Tensor, rejected: Tensor, weight: float) -> Tensor:
    """Compute -weight * log sigma(chosen - rejected) from log-odds. [N], [N] -> [N]

    Hong et al. 2024 (ORPO), equation 7, with the weight lambda of equation 6. The full loss of ORPO also has the NLL of
    the chosen response, per token.
    """
    return weight * bradley_terry_loss(chosen, rejected)


def kto_loss(rewards: Tensor, desirable: Tensor, reference_point: Tensor) -> Tensor:
    """Compute 1 - sigma(r - z) of desirable responses, 1 - sigma(z - r) of undesirable ones. [N], [N] bool, [] -> [N]

    Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), with lambda_D = lambda_U = 1. r is the implicit reward. z is beta
    times the KL of the policy to the reference; it is a constant, so no gradient may flow through it.
    """
    check_shapes(rewards, desirable)
    return torch.where(desirable, reference_point - rewards, rewards - reference_point).sigmoid()


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Compute (h - 1 / (2 beta))^2, h = (chosen - rejected) / beta, from implicit rewards. [N], [N] -> [N]

    h is the difference of the log-ratios log pi - log pi_ref, summed over the tokens of a response. Azar et al. 2023,
    equation 17, with beta for their tau. The log-ratios of a pair that all raters rank alike end at a difference of
    1 / (2 beta).
    """
    check_shapes(chosen, rejected)
    return ((chosen - rejected - 0.5) / beta) ** 2
