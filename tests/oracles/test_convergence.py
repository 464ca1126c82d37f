"""A2C and PPO, assembled from keel.core alone, find the closed-form optimum of T3; wrong forms do not.

An end-to-end run sees these mistakes, but is blind to an end token without gradient or to stored log-probs at another
temperature: `test_system.py` looks for those.
"""

import pytest
import torch
from torch import Tensor

from keel.core.advantages import discounted_returns, gae
from keel.core.kl import kl_estimate
from keel.core.losses import clipped_policy_loss, policy_gradient_loss, value_loss
from keel.core.masked import masked_mean, masked_sum, whiten
from keel.core.rewards import place_scores, token_rewards

from .t3 import OPTIMUM
from .tabular import (
    BY_STATE,
    KL_COEF,
    MASK,
    SCORES,
    answer_logprobs,
    logprobs,
    objective,
    reference_by_state,
    total_variation,
)

pytestmark = pytest.mark.usefixtures("float64")

UPDATES, ANSWERS_PER_UPDATE = 300, 64
BEST = OPTIMUM[KL_COEF][0]


def learn(algorithm: str, seed: int) -> Tensor:
    """A policy and a critic that are tables, updated on sampled answers as in a run of keel. Returns the logits."""
    generator = torch.Generator().manual_seed(seed)
    policy, critic = reference_by_state().requires_grad_(), torch.zeros(7, requires_grad=True)
    optimizer = torch.optim.Adam([policy, critic], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, UPDATES)
    ref_logprobs = logprobs(reference_by_state())
    for _ in range(UPDATES):
        stored = logprobs(policy.detach())
        probabilities = masked_sum(stored, MASK, dim=1).exp()
        drawn = torch.multinomial(probabilities, ANSWERS_PER_UPDATE, replacement=True, generator=generator)
        mask, values = MASK[drawn], critic.detach()[BY_STATE[drawn]]
        rewards = token_rewards(
            place_scores(SCORES[drawn], mask), kl_estimate(stored, ref_logprobs)[drawn], mask, KL_COEF
        )
        advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
        if algorithm == "ppo":
            advantages = whiten(advantages, mask)
        for _ in range(4 if algorithm == "ppo" else 1):
            new_logprobs = logprobs(policy)[drawn]
            if algorithm == "ppo":
                losses = clipped_policy_loss(new_logprobs, stored[drawn], advantages, 0.2, 0.2)
            else:
                losses = policy_gradient_loss(new_logprobs, advantages)
            losses = losses + value_loss(critic[BY_STATE[drawn]], values, returns)
            optimizer.zero_grad()
            masked_mean(losses, mask).backward()
            optimizer.step()
        schedule.step()
    return policy.detach()


@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_is_found(algorithm: str, seed: int) -> None:
    policy = learn(algorithm, seed)
    assert total_variation(policy) < 0.02
    assert objective(policy).item() == pytest.approx(BEST, abs=0.005)


def follow_exactly(estimator: str, kl_in: str, kl_coef: float) -> Tensor:
    """Every answer weighted by its probability, so that no sampling noise blurs what a form converges to."""
    policy = reference_by_state().requires_grad_()
    optimizer = torch.optim.Adam([policy], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 2 * UPDATES)
    ref_logprobs = logprobs(reference_by_state())
    for _ in range(2 * UPDATES):
        new_logprobs = logprobs(policy)
        kl = kl_estimate(new_logprobs, ref_logprobs, estimator)
        in_reward = kl.detach() if kl_in == "reward" else torch.zeros_like(kl)
        advantages = discounted_returns(
            token_rewards(place_scores(SCORES, MASK), in_reward, MASK, kl_coef), MASK, gamma=1.0
        )
        losses = policy_gradient_loss(new_logprobs, advantages)
        if kl_in == "loss":
            losses = losses + kl_coef * kl
        optimizer.zero_grad()
        (answer_logprobs(policy).exp().detach() * masked_sum(losses, MASK, dim=1)).sum().backward()
        optimizer.step()
        schedule.step()
    return policy.detach()


def test_k1_in_the_reward_is_the_right_form() -> None:
    policy = follow_exactly("k1", "reward", KL_COEF)
    assert total_variation(policy) < 1e-4
    assert objective(policy).item() == pytest.approx(BEST, abs=1e-6)


# estimator, where it acts, coefficient -> total variation to pi*, J
WRONG_FORMS = {
    "k2 in the loss": ("k2", "loss", KL_COEF, 0.1714, 0.8723),  # omits what a token does to the KL of later tokens
    "k3 in the loss": ("k3", "loss", KL_COEF, 0.1411, 0.8151),  # GRPO's form; besides, the gradient of KL(ref || pi)
    "k2 in the reward": ("k2", "reward", KL_COEF, 0.475, 0.591),
    "k3 in the reward": ("k3", "reward", KL_COEF, 0.4760, 0.5882),  # a right value with a wrong gradient: as if no KL
    "no KL": ("k1", "reward", 0.0, 0.4759, 0.5887),
}


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_every_other_form_converges_elsewhere(form: str) -> None:
    estimator, kl_in, kl_coef, distance, value = WRONG_FORMS[form]
    policy = follow_exactly(estimator, kl_in, kl_coef)
    assert total_variation(policy) == pytest.approx(distance, abs=0.005)
    assert objective(policy).item() == pytest.approx(value, abs=0.006)


def test_the_wrong_sign_drives_the_policy_away() -> None:
    policy = follow_exactly("k1", "reward", -KL_COEF)
    assert total_variation(policy) > 0.4
    assert objective(policy).item() < 0.6
