"""The losses of `keel dpo`, from the log-probabilities of the responses of each ranking."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from keel.config import DpoConfig
from keel.core.preferences import bradley_terry_loss, implicit_rewards, ipo_loss, log_odds, odds_ratio_loss
from keel.data.preferences import Ranking
from keel.learn.comparisons import Comparisons, listwise_losses, pairwise_losses


def response_rewards(logprobs: Tensor, lengths: Tensor, ref_logprobs: Tensor | None, config: DpoConfig) -> Tensor:
    """Compute the value of each response that is compared. [M], [M], [M] -> [M]

    sigmoid, ipo, listwise: the implicit reward. simpo: beta times the mean log-probability of a token, without a
    reference (Meng et al. 2024, equation 4). orpo: the log-odds, without a reference (Hong et al. 2024, equation 4).
    With `length_normalized`, the implicit reward is divided by the length of the response (Lambert et al. 2024, Tulu 3,
    equation 6).
    """
    if config.loss == "orpo":
        return log_odds(logprobs / lengths)
    if config.loss == "simpo":
        return config.beta * logprobs / lengths
    assert ref_logprobs is not None
    rewards = implicit_rewards(logprobs, ref_logprobs, config.beta)
    return rewards / lengths if config.length_normalized else rewards


def dpo_losses(rewards: Tensor, rankings: Sequence[Ranking], config: DpoConfig) -> Tensor:
    """Compute the loss of each ranking from the values of all responses. [M] -> [N]

    The loss is the mean over the comparisons of a ranking, times its weight. So a ranking with many responses counts no
    more than one with few, as in `keel reward`.
    """
    comparisons = Comparisons.from_rankings(rewards, rankings)
    if config.loss == "listwise":  # Rafailov et al. 2023, appendix A.3
        losses = listwise_losses(comparisons)
    else:
        losses = pairwise_losses(comparisons, partial(pair_loss, config), config.ties)
    return ranking_weights(rewards, rankings) * losses


def pair_loss(config: DpoConfig, chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """Compute the loss of each pair from the values of its responses. [M], [M], [M] -> [M]"""
    if config.loss == "ipo":
        return ipo_loss(chosen, rejected, config.beta)
    if config.loss == "orpo":
        return odds_ratio_loss(chosen, rejected, config.beta)
    return bradley_terry_loss(chosen, rejected, margins + config.target_margin, config.label_smoothing)


def nll_losses(logprobs: Tensor, lengths: Tensor, rankings: Sequence[Ranking]) -> Tensor:
    """Compute -log pi(y|x) / |y| of the best responses of each ranking, their mean, times its weight. [M], [M] -> [N]

    Pang et al. 2024 (Iterative reasoning preference optimization, equation 1) and Llama 3 (Grattafiori et al. 2024,
    section 4.1.4) add it to DPO; it is the first term of ORPO (Hong et al. 2024, equation 6).
    """
    best = [[rank == min(r for r in ranking.ranks if r is not None) for rank in ranking.ranks] for ranking in rankings]
    shares = logprobs.new_tensor([is_best / sum(of_ranking) for of_ranking in best for is_best in of_ranking])
    numbers = [number for number, of_ranking in enumerate(best) for _ in of_ranking]
    owners = torch.tensor(numbers, device=logprobs.device)
    means = logprobs.new_zeros(len(rankings)).index_add(0, owners, -shares * logprobs / lengths)
    return ranking_weights(logprobs, rankings) * means


def total_losses(
    logprobs: Tensor, lengths: Tensor, rewards: Tensor, rankings: Sequence[Ranking], config: DpoConfig
) -> Tensor:
    """Compute the loss of the comparisons plus `nll_weight` times that of the best responses. [M] x 3 -> [N]"""
    losses = dpo_losses(rewards, rankings, config)
    if config.nll_weight:
        losses = losses + config.nll_weight * nll_losses(logprobs, lengths, rankings)
    return losses


def ranking_weights(like: Tensor, rankings: Sequence[Ranking]) -> Tensor:
    return like.new_tensor([ranking.weight for ranking in rankings])
