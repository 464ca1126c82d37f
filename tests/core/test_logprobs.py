"""Log-probabilities and entropy at the sampling temperature (oracle O16, formula F19)."""

import math

import pytest
import torch

from keel.core.kl import kl_estimate
from keel.core.logprobs import entropy, logprobs_and_entropy, token_logprobs

from .expect import close, gradient

LOGITS = [2.0, 1.0, 0.0]


def all_tokens(logits: list[float], temperature: float = 1.0) -> torch.Tensor:
    rows = torch.tensor([logits] * len(logits))
    return token_logprobs(rows, torch.arange(len(logits)), temperature)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [-0.40760596, -1.40760596, -2.40760596]),
        (0.7, [-0.2601184, -1.68868983, -3.11726126]),
        (2.0, [-0.68026967, -1.18026967, -1.68026967]),
    ],
)
def test_o16_logprobs_at_a_temperature(temperature: float, expected: list[float]) -> None:
    close(all_tokens(LOGITS, temperature), expected)


def test_o16_entropy() -> None:
    close(entropy(torch.tensor(LOGITS)), 0.8323955818)
    close(entropy(torch.zeros(4, 5)), [math.log(5)] * 4)  # the largest possible
    close(entropy(torch.tensor([1000.0, 0.0])), 0.0)  # the smallest
    close(entropy(torch.tensor([4.0, 2.0, 0.0]), temperature=2.0), 0.8323955818)


def test_entropy_gradient_is_minus_p_times_logp_plus_entropy() -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    # p (-log p - H) with p = .66524096, .24472847, .09003057
    close(gradient(entropy(logits), logits)[0], [-0.28258745, 0.14077036, 0.14181709])


def test_logprobs_keep_the_leading_shape_and_choose_the_named_token() -> None:
    logits = torch.tensor([[LOGITS, LOGITS], [[0.0, 0.0, 0.0], LOGITS]])
    tokens = torch.tensor([[0, 2], [1, 1]])
    close(token_logprobs(logits, tokens), [[-0.40760596, -2.40760596], [-1.09861229, -1.40760596]])


def test_shifting_all_logits_changes_nothing_and_huge_logits_stay_finite() -> None:
    close(all_tokens([1002.0, 1001.0, 1000.0]), [-0.40760596, -1.40760596, -2.40760596])
    close(all_tokens([1e6, 0.0, -1e6]), [0.0, -1e6, -2e6])


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    logprob = token_logprobs(logits, torch.tensor([7]))
    assert logprob.dtype == torch.float32
    close(logprob, [-math.log(50_000)], atol=1e-5)
    assert entropy(logits).dtype == torch.float32
    tempered = token_logprobs(torch.tensor([LOGITS], dtype=torch.bfloat16), torch.tensor([1]), 0.7)
    close(tempered, [-1.68868983], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_o16_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    for function in (lambda: all_tokens(LOGITS, temperature), lambda: entropy(torch.tensor(LOGITS), temperature)):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            function()


def test_logits_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(torch.zeros(2, 4, 3), torch.zeros(2, 1, dtype=torch.long))


def test_o16_why_truncated_sampling_is_refused_in_training() -> None:
    """Sampling from the two likeliest of four words, scored with full-vocabulary log-probs: the mean of k1 comes out
    negative, though the divergence that it estimates is +0.1923012."""
    policy, reference = all_tokens([0.5, 0.4, 0.0, 0.0]), all_tokens([2.0, 1.5, 0.0, 0.0])
    k1 = kl_estimate(policy, reference)
    close((policy.exp() * k1).sum(), 0.1923012, atol=1e-7)
    close((torch.tensor([0.5, 0.4]).softmax(0) * k1[:2]).sum(), -0.3173690, atol=1e-7)


def test_both_at_once_are_the_two_of_them():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([0, 6, 3, 3, 1])
    logprobs, entropies = logprobs_and_entropy(logits, tokens, 0.7)
    torch.testing.assert_close(logprobs, token_logprobs(logits, tokens, 0.7), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies, entropy(logits, 0.7), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="do not fit"):
        logprobs_and_entropy(logits, tokens[:2])


def test_the_gradient_of_both_at_once():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy(x, tokens, 1.3)[0], (logits,))
    assert not logprobs_and_entropy(logits, tokens)[1].requires_grad
