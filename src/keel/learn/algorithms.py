"""The functions of each algorithm: how it computes advantages, and its policy loss.

The table of algorithms is `keel.algorithms.ALGORITHM_TRAITS`. A new estimator of advantages is a function here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from keel.algorithms import ALGORITHM_TRAITS
from keel.core.advantages import discounted_returns, gae, group_deviations, grpo, rloo
from keel.core.losses import clipped_policy_loss, clipped_weight_loss, policy_gradient_loss
from keel.core.rewards import token_rewards


@dataclass(frozen=True)
class Credit:
    """The inputs of an advantage function."""

    token_scores: Tensor  # [B, T], shaped scores
    kl: Tensor  # [B, T], estimate of the KL to the reference
    kl_coef: float  # weight of the KL in the reward; 0 if the KL is in the loss
    values: Tensor  # [B, T], zeros without a critic
    response_mask: Tensor  # [B, T] bool
    final_values: Tensor | None  # [B], value after a truncated response; None = terminal
    gamma: float
    gae_lambda: float
    group_size: int
    normalize_std: bool
    usual_deviation: float = 0.0  # of the scores within a group: root mean square over the groups of all ranks

    @property
    def rewards(self) -> Tensor:
        """Token rewards. [B, T]"""
        return token_rewards(self.token_scores, self.kl, self.response_mask, self.kl_coef)

    @property
    def penalties(self) -> Tensor:
        """KL penalty of each response. [B]"""
        return self.kl_coef * self.kl.sum(1)


@dataclass(frozen=True)
class Loss:
    """The inputs of a policy loss; tensors are per counted token, [N]."""

    new_logprobs: Tensor
    logprobs: Tensor
    advantages: Tensor
    clip_range_low: float
    clip_range_high: float
    dual_clip: float | None
    clips_weight: bool = False  # CISPO: the limit is that of the weight of a token's gradient


@dataclass(frozen=True)
class Algorithm:
    advantages: Callable[[Credit], tuple[Tensor, Tensor]]  # -> advantages, returns [B, T]
    policy_loss: Callable[[Loss], Tensor]  # -> [N]
    needs_critic: bool
    compares_groups: bool
    """Whether advantages are relative to the other responses to the prompt"""
    whitens: bool = True
    """Whether advantages may be whitened over the batch, which would undo the scale of those of rloo and grpo"""


def _gae(credit: Credit) -> tuple[Tensor, Tensor]:
    return gae(
        credit.rewards,
        credit.values,
        credit.response_mask,
        credit.gamma,
        credit.gae_lambda,
        credit.final_values,
    )


def _returns(credit: Credit) -> tuple[Tensor, Tensor]:
    returns = discounted_returns(credit.rewards, credit.response_mask, credit.gamma)
    return returns, returns


def _rloo(credit: Credit) -> tuple[Tensor, Tensor]:
    # Scores and KL are compared separately, so that equal scores of any size cancel exactly.
    scores = rloo(credit.token_scores.sum(1), credit.group_size)
    return _spread(scores - rloo(credit.penalties, credit.group_size), credit)


def _grpo(credit: Credit) -> tuple[Tensor, Tensor]:
    """Divide scores and KL by the deviation of the scores alone, so that kl_coef keeps its weight.

    If all scores of a group are equal, the deviation of score and KL together is that of the KL. Divided by it, the KL
    would be noise of size one for any kl_coef. The divisor of the KL is therefore at least a tenth of the deviation
    that is usual in the batch.
    """
    scores = credit.token_scores.sum(1)
    penalties = grpo(credit.penalties, credit.group_size, normalize_std=False)
    if credit.normalize_std and credit.usual_deviation > 0:
        deviations = group_deviations(scores, credit.group_size).clamp(min=0.1 * credit.usual_deviation)
        penalties = penalties / deviations.repeat_interleave(credit.group_size)
    return _spread(grpo(scores, credit.group_size, credit.normalize_std) - penalties, credit)


def _group_mean(credit: Credit) -> tuple[Tensor, Tensor]:
    """Return score and KL penalty of each response minus the mean of its group (Hu et al. 2025, REINFORCE++-baseline).

    Scores and KL are compared separately, so that equal scores of any size cancel exactly.
    """
    scores = grpo(credit.token_scores.sum(1), credit.group_size, normalize_std=False)
    return _spread(scores - grpo(credit.penalties, credit.group_size, normalize_std=False), credit)


def _spread(advantages: Tensor, credit: Credit) -> tuple[Tensor, Tensor]:
    """Put the advantage of each response on all of its tokens. [B] -> [B, T], [B, T]"""
    spread = advantages.unsqueeze(1) * credit.response_mask
    return spread, spread


def _gradient(loss: Loss) -> Tensor:
    return policy_gradient_loss(loss.new_logprobs, loss.advantages)


def _clipped(loss: Loss) -> Tensor:
    if loss.clips_weight:
        return clipped_weight_loss(
            loss.new_logprobs, loss.logprobs, loss.advantages, loss.clip_range_low, loss.clip_range_high
        )
    return clipped_policy_loss(
        loss.new_logprobs,
        loss.logprobs,
        loss.advantages,
        loss.clip_range_low,
        loss.clip_range_high,
        loss.dual_clip,
    )


ADVANTAGES: dict[str, Callable[[Credit], tuple[Tensor, Tensor]]] = {
    "gae": _gae,
    "returns": _returns,
    "rloo": _rloo,
    "grpo": _grpo,
    "group_mean": _group_mean,
}

ALGORITHMS = {
    name: Algorithm(
        ADVANTAGES[traits.advantages],
        _clipped if traits.clips_ratio else _gradient,
        traits.needs_critic,
        traits.compares_groups,
        traits.whitens,
    )
    for name, traits in ALGORITHM_TRAITS.items()
}
