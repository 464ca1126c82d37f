"""On T3 the best policy is known in closed form, and keel's log-probs find every number of it."""

import math

import pytest
import torch

from ..core.expect import close
from . import t3
from .tabular import (
    BY_WORD,
    SCORES,
    answer_logprobs,
    divergence,
    mean_score,
    objective,
    optimal_answer_logprobs,
    reference_by_state,
    reference_by_word,
    total_variation,
)

pytestmark = pytest.mark.usefixtures("float64")


def optimal_table(kl_coef: float) -> torch.Tensor:
    """pi* token by token, from the soft values: pi*(a|s) = pi_ref(a|s) exp((Q - V) / kl_coef). [7, 3]"""

    def logit(state: t3.State, token: int) -> float:
        after = (*state, token)
        ended = token == t3.END or len(after) == t3.LENGTH
        q = t3.score(after) if ended else t3.soft_value(after, kl_coef)
        return t3.logprob(after, len(state)) + (q - t3.soft_value(state, kl_coef)) / kl_coef

    return torch.tensor([[logit(state, token) for token in range(3)] for state in t3.STATES])


def test_the_generator_still_prints_the_literals() -> None:
    assert [t3.expectation(state, float) for state in t3.STATES] == pytest.approx(
        list(t3.REFERENCE_VALUES.values()), abs=1e-10
    )
    assert [t3.soft_value(state, 0.5) for state in t3.STATES] == pytest.approx(list(t3.SOFT_VALUES.values()), abs=1e-10)
    for kl_coef, numbers in t3.OPTIMUM.items():
        assert t3.optimum(kl_coef) == pytest.approx(numbers, abs=1e-10)
    close(torch.tensor(t3.score_gradient()), t3.SCORE_GRADIENT)


def test_probabilities_of_all_answers_sum_to_one() -> None:
    assert len(t3.ANSWERS) == 15
    for table in (reference_by_state(), 5 * torch.randn(7, 3, generator=torch.Generator().manual_seed(0))):
        close(answer_logprobs(table).exp().sum(), 1.0, atol=1e-12)


def test_the_reference() -> None:
    close(answer_logprobs(reference_by_state()), [t3.logprob(answer) for answer in t3.ANSWERS], atol=1e-12)
    close(answer_logprobs(reference_by_word(), BY_WORD), [t3.logprob(answer) for answer in t3.ANSWERS], atol=1e-12)
    close(mean_score(reference_by_state()), t3.REFERENCE_SCORE, atol=1e-10)
    close(divergence(reference_by_state()), 0.0, atol=1e-15)


@pytest.mark.parametrize("kl_coef", t3.OPTIMUM)
def test_the_optimum(kl_coef: float) -> None:
    best, best_score, best_divergence = t3.OPTIMUM[kl_coef]
    table = optimal_table(kl_coef)
    close(objective(table, kl_coef), best, atol=1e-9)
    close(mean_score(table), best_score, atol=1e-9)
    close(divergence(table), best_divergence, atol=1e-9)
    close(answer_logprobs(table), optimal_answer_logprobs(kl_coef).tolist(), atol=1e-9)
    log_z = (answer_logprobs(reference_by_state()) + SCORES / kl_coef).logsumexp(0)
    close(kl_coef * log_z, best, atol=1e-9)


def test_the_optimal_policy_at_one_half() -> None:
    optimal = dict(zip(t3.ANSWERS, optimal_answer_logprobs().exp().tolist(), strict=True))
    for answer, probability in t3.OPTIMAL_ANSWERS.items():
        assert optimal[answer] == pytest.approx(probability, abs=1e-9)
    assert sum(p for y, p in optimal.items() if y[-1] != t3.END) == pytest.approx(t3.OPTIMAL_TRUNCATED, abs=1e-9)
    close(optimal_table(0.5)[0].exp(), t3.OPTIMAL_FIRST_TOKEN, atol=1e-9)
    assert total_variation(optimal_table(0.5)) < 1e-9
    close(math.exp(t3.soft_value((), 0.5) / 0.5), t3.PARTITION, atol=1e-9)


def test_no_policy_is_better() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(7, 3, generator=generator) * scale for scale in (0.1, 1.0, 3.0, 10.0) for _ in range(250)]
    assert max(objective(table).item() for table in tables) <= t3.OPTIMUM[0.5][0]
    near = [optimal_table(0.5) + 0.01 * torch.randn(7, 3, generator=generator) for _ in range(100)]
    assert max(objective(table).item() for table in near) <= t3.OPTIMUM[0.5][0]


def test_at_the_optimum_the_gradient_vanishes() -> None:
    table = optimal_table(0.5).requires_grad_()
    (grad,) = torch.autograd.grad(objective(table), table)
    close(grad, [[0.0] * 3] * 7)
