"""What the losses follow is the gradient of the expected score, exactly and by sampling."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from keel.core.advantages import discounted_returns, gae, rloo
from keel.core.losses import policy_gradient_loss
from keel.core.masked import masked_sum
from keel.core.rewards import place_scores, token_rewards

from ..core.expect import close
from .t3 import REFERENCE_VALUES, SCORE_GRADIENT
from .tabular import BY_STATE, BY_WORD, MASK, SCORES, answer_logprobs, logprobs, mean_score, reference_by_word

pytestmark = pytest.mark.usefixtures("float64")

VALUES = torch.tensor(list(REFERENCE_VALUES.values()), dtype=torch.float64)[BY_STATE]  # V_ref before each token [15, 3]


def rewards() -> Tensor:
    return token_rewards(place_scores(SCORES, MASK), torch.zeros(15, 3), MASK, kl_coef=0.0)


def reinforce_advantages() -> Tensor:
    return discounted_returns(rewards(), MASK, gamma=1.0)


def a2c_advantages(gae_lambda: float = 0.0) -> Tensor:
    return gae(rewards(), VALUES, MASK, 1.0, gae_lambda)[0]


def gradient_of_each_answer(advantages: Tensor) -> Tensor:
    """-d policy_gradient_loss(answer)/d table, one for each of the 15 answers. [15, 9]"""
    table = reference_by_word().requires_grad_()
    loss = masked_sum(policy_gradient_loss(logprobs(table, BY_WORD), advantages), MASK, dim=1)
    rows = [torch.autograd.grad(loss[i], table, retain_graph=True)[0].flatten() for i in range(15)]
    return -torch.stack(rows)


def probabilities() -> Tensor:
    return answer_logprobs(reference_by_word(), BY_WORD).exp()


def test_autograd_of_the_expected_score() -> None:
    table = reference_by_word().requires_grad_()
    (grad,) = torch.autograd.grad(mean_score(table, BY_WORD), table)
    close(grad, SCORE_GRADIENT, atol=1e-9)


def test_finite_difference_of_the_expected_score() -> None:
    for row in range(3):
        for column in range(3):
            step = torch.zeros(3, 3)
            step[row, column] = 1e-5
            up, down = (mean_score(reference_by_word() + sign * step, BY_WORD) for sign in (1, -1))
            close((up - down) / 2e-5, SCORE_GRADIENT[row][column])


@pytest.mark.parametrize(
    "advantages",
    [reinforce_advantages, a2c_advantages, lambda: a2c_advantages(0.95), lambda: a2c_advantages(1.0)],
    ids=["reinforce", "a2c", "gae .95", "gae 1"],
)
def test_expected_gradient_of_the_policy_loss(advantages: Callable[[], Tensor]) -> None:
    expected = probabilities() @ gradient_of_each_answer(advantages())
    close(expected.view(3, 3), SCORE_GRADIENT, atol=1e-9)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_with_true_values_the_advantage_is_zero_on_average_in_every_state(gae_lambda: float) -> None:
    advantages = a2c_advantages(gae_lambda)
    for state in range(7):
        here = BY_STATE.eq(state) & MASK
        close((probabilities().unsqueeze(1) * advantages)[here].sum(), 0.0, atol=1e-10)


def test_true_values_lower_the_variance() -> None:
    def variance(advantages: Tensor) -> float:
        gradients = gradient_of_each_answer(advantages)
        return (probabilities() @ (gradients - probabilities() @ gradients) ** 2).sum().item()

    one_step, traces, no_critic = map(variance, (a2c_advantages(0.0), a2c_advantages(0.95), reinforce_advantages()))
    assert 2 * one_step < traces < no_critic


def sampled(seed: int, count: int = 20_000) -> Tensor:
    return torch.multinomial(probabilities(), count, replacement=True, generator=torch.Generator().manual_seed(seed))


def is_within_four_standard_errors(gradients: Tensor) -> bool:
    """Compare independent estimates [N, 9] with the table; a mistake of one part in ten does not pass."""
    expected = torch.tensor(SCORE_GRADIENT).flatten()
    standard_error = gradients.std(0) / len(gradients) ** 0.5
    is_close = bool(((gradients.mean(0) - expected).abs() < 4 * standard_error).all())
    return is_close and bool(standard_error.norm() < 0.1 * expected.norm())


@pytest.mark.parametrize("advantages", [reinforce_advantages, a2c_advantages], ids=["reinforce", "a2c"])
def test_sampled_gradient(advantages: Callable[[], Tensor]) -> None:
    assert is_within_four_standard_errors(gradient_of_each_answer(advantages())[sampled(seed=0)])


def test_sampled_gradient_of_rloo() -> None:
    drawn = sampled(seed=1)
    score_function = gradient_of_each_answer(torch.ones(15, 3))[drawn]
    estimates = rloo(SCORES[drawn], group_size=4).unsqueeze(1) * score_function
    assert is_within_four_standard_errors(estimates.view(-1, 4, 9).mean(1))
