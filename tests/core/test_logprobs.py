"""Log-probabilities and entropy at the sampling temperature."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from keel import kernels
from keel.core import logprobs as module
from keel.core.kl import kl_estimate
from keel.core.logprobs import logprobs_and_entropy, token_logprobs

from .expect import close, gradient

LOGITS = [2.0, 1.0, 0.0]


def entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    return logprobs_and_entropy(logits, tokens, temperature, entropy_gradient=True)[1]


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
def test_logprobs_at_a_temperature(temperature: float, expected: list[float]) -> None:
    close(all_tokens(LOGITS, temperature), expected)


def test_entropy() -> None:
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
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    for function in (lambda: all_tokens(LOGITS, temperature), lambda: entropy(torch.tensor(LOGITS), temperature)):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            function()


def test_logits_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(torch.zeros(2, 4, 3), torch.zeros(2, 1, dtype=torch.long))


def test_why_truncated_sampling_is_refused_in_training() -> None:
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


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute: the compiled kernels and torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "available", lambda *tensors: False)
    elif not kernels.available():
        pytest.skip("no C compiler here")
    return str(request.param)


def drawn(count: int, words: int, deviation: float, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 logits [count, words] and, by turns, likely and arbitrary tokens."""
    generator = torch.Generator().manual_seed(words + seed)
    logits = torch.randn(count, words, generator=generator, dtype=torch.float32) * deviation + offset
    likely = torch.multinomial((logits - offset).softmax(-1), 1, generator=generator).squeeze(1)
    arbitrary = torch.randint(words, (count,), generator=generator)
    return logits, torch.where(torch.arange(count) % 2 == 0, likely, arbitrary)


def exact(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    every = (logits.double() / temperature).log_softmax(-1)
    return every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(every.exp() * every).sum(-1)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("deviation", "offset"), [(1.0, 0.0), (5.0, 0.0), (3.0, 3000.0), (3.0, -3000.0)])
@pytest.mark.parametrize("words", [512, 32_000, 152_000])
def test_large_vocabularies_and_offsets_cost_no_precision(
    words: int, deviation: float, offset: float, temperature: float
) -> None:
    logits, tokens = drawn(8, words, deviation, offset)
    wanted = exact(logits, tokens, temperature)
    both = logprobs_and_entropy(logits, tokens, temperature)
    alone = token_logprobs(logits, tokens, temperature), entropy(logits, temperature)
    for computed in (both, alone):
        for ours, reference in zip(computed, wanted, strict=True):
            torch.testing.assert_close(ours.double(), reference, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("path")
def test_a_thousand_tokens_of_a_large_vocabulary_have_no_bias() -> None:
    errors = []
    for seed in range(10):
        logits, tokens = drawn(100, 32_000, 5.0, seed=seed)
        pairs = zip(logprobs_and_entropy(logits, tokens), exact(logits, tokens), strict=True)
        errors.append(torch.stack([ours.double() - reference for ours, reference in pairs]))
    assert torch.cat(errors, 1).mean(1).abs().max() < 3e-7


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("words", [512, 152_000])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_gradients_of_large_vocabularies_are_as_precise(words: int, weight: float) -> None:
    """`weight` is that of the entropy."""
    logits, tokens = drawn(8, words, 3.0, 3000.0)
    logits.requires_grad_()
    wide = logits.detach().double().requires_grad_()
    logprobs, entropies = logprobs_and_entropy(logits, tokens, 0.7, entropy_gradient=True)
    [ours] = gradient(logprobs + weight * entropies if weight else logprobs, logits)
    expected = exact(wide, tokens, 0.7)
    [wanted] = gradient(expected[0] + weight * expected[1], wide)
    torch.testing.assert_close(ours.double(), wanted, rtol=5e-6, atol=1e-9)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_entropy_is_never_below_0_or_above_that_of_equal_logits(temperature: float) -> None:
    for words in (1, 2, 3, 5, 50, 3_000, 32_000):
        nearly = 1e-4 * drawn(20, words, 1.0)[0]
        for logits in (0 * nearly, nearly, nearly + 100 * (torch.arange(words) == 0)):
            found = entropy(logits, temperature).double()
            assert ((found >= 0) & (found <= math.log(words))).all(), words


@pytest.mark.usefixtures("path")
def test_impossible_words_have_no_part_in_entropy_and_gradient() -> None:
    logits = torch.tensor([[2.0, 1.0, -math.inf, 0.0]], dtype=torch.float32, requires_grad=True)
    found = entropy(logits)
    close(found, [0.8323955818], atol=1e-6)
    close(gradient(found, logits)[0], [[-0.28258745, 0.14077036, 0.0, 0.14181709]], atol=1e-6)


@pytest.mark.usefixtures("path")
def test_a_number_that_is_none_stays_one() -> None:
    logits = torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 0.0]], dtype=torch.float32)
    for found in logprobs_and_entropy(logits, torch.tensor([0, 0])):
        assert found.isnan().tolist() == [True, False]


@pytest.mark.parametrize("at_once", [8, 2**18])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_gradients_of_log_probs_and_entropy(at_once: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of two rows, and all at once."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy(x, tokens, temperature, True), (logits,))
    assert torch.autograd.gradcheck(lambda x: entropy(x, temperature), (logits,))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, temperature), (logits,))


class Widest(TorchDispatchMode):
    """Records how many numbers the largest double-precision result has."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.count = max(self.count, result.numel())
        return result


def test_no_copy_of_the_logits_is_made_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda *tensors: False)
    logits, tokens = drawn(16, 1000, 3.0)
    logits.requires_grad_()
    with Widest() as widest:
        logprobs, entropies = logprobs_and_entropy(logits, tokens, 0.7, entropy_gradient=True)
        (logprobs + entropies).sum().backward()
    assert widest.count == 16
