"""KL estimators and the controller of their weight."""

import math

import pytest
import torch
from torch import Tensor

from keel.core.kl import kl_estimate, updated_kl_coef, without_rounding
from keel.core.logprobs import token_logprobs

from .expect import close, gradient

LOGITS = [1.0, 0.0, -1.0]  # the policy; the reference is uniform
MEAN = {"k1": 0.2662167068, "k2": 0.2476379398, "k3": 0.2662167068}
VARIANCE = {"k1": 0.4244045447, "k2": 0.0432328731, "k3": 0.1291742152}
REVERSE_KL_GRADIENT = [0.2825874511, -0.1407703575, -0.1418170936]  # of KL(pi || ref) in the logits
ESTIMATORS = ["k1", "k2", "k3"]


def policy_and_reference() -> tuple[Tensor, Tensor, Tensor]:
    """The policy's logits, and the log-probs of each of the three tokens under policy and reference."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    tokens = torch.arange(3)
    return logits, token_logprobs(logits.expand(3, 3), tokens), token_logprobs(torch.zeros(3, 3), tokens)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_and_variance_of_each_estimator(estimator: str) -> None:
    _, policy, reference = policy_and_reference()
    estimate = kl_estimate(policy, reference, estimator)
    mean = (policy.exp() * estimate).sum()
    close(mean, MEAN[estimator])
    close((policy.exp() * (estimate - mean) ** 2).sum(), VARIANCE[estimator])


def test_the_divergence_is_not_symmetric() -> None:
    _, policy, reference = policy_and_reference()
    close((reference.exp() * kl_estimate(reference, policy)).sum(), 0.3089936758)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.0, 0.0, 0.0]),
        ("k2", REVERSE_KL_GRADIENT),
        ("k3", [0.3319076224, -0.0886048623, -0.2433027602]),  # pi - ref: the gradient of KL(ref || pi)
    ],
)
def test_gradient_of_the_estimator_itself(estimator: str, expected: list[float]) -> None:
    """What "KL in the loss" follows: E[grad k], tokens drawn from the policy."""
    logits, policy, reference = policy_and_reference()
    loss = policy.exp().detach() * kl_estimate(policy, reference, estimator)
    close(gradient(loss, logits)[0], expected)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", REVERSE_KL_GRADIENT), ("k3", [-0.0493201714, -0.0521654952, 0.1014856666])],
)
def test_gradient_of_the_estimator_as_a_reward(estimator: str, expected: list[float]) -> None:
    """What "KL in the reward" follows: E[k grad log pi]. Only k1 gives the divergence's gradient."""
    logits, policy, reference = policy_and_reference()
    weight = (policy.exp() * kl_estimate(policy, reference, estimator)).detach()
    close(gradient(weight * policy, logits)[0], expected)


@pytest.mark.parametrize(
    ("mu", "std_over_kl", "k2_bias"),
    [
        (0.1, {"k1": 20.0, "k2": 1.4177, "k3": 1.4166}, 0.0025),
        (1.0, {"k1": 2.0, "k2": 1.7321, "k3": 1.6950}, 0.25),
    ],
)
def test_schulmans_table_for_two_gaussians(mu: float, std_over_kl: dict[str, float], k2_bias: float) -> None:
    """N(0, 1) against N(mu, 1), KL = mu^2 / 2, integrated on a fine grid."""
    x = torch.linspace(-14.0, 14.0, 20_001)
    weight = torch.exp(-(x**2) / 2)
    weight = weight / weight.sum()
    for estimator, expected in std_over_kl.items():
        estimate = kl_estimate(-(x**2) / 2, -((x - mu) ** 2) / 2, estimator)
        mean = (weight * estimate).sum()
        std = (weight * (estimate - mean) ** 2).sum().sqrt()
        close(mean / (mu**2 / 2), 1.0 + (k2_bias if estimator == "k2" else 0.0))
        close(std / (mu**2 / 2), expected, atol=5e-5)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [-1.0, 14.0, 29.0]), ("k2", [0.5, 98.0, 420.5]), ("k3", [0.7182818285, 13.0, 28.0])],
)
def test_extreme_log_ratios_are_measured_not_clamped(estimator: str, expected: list[float]) -> None:
    estimate = kl_estimate(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([0.0, -15.0, -30.0]), estimator)
    close(estimate, expected, atol=1e-5 if estimator == "k3" else 1e-12)


def test_k3_of_a_token_that_the_reference_finds_far_likelier() -> None:
    estimate = kl_estimate(torch.tensor([-31.0]), torch.tensor([-1.0]), "k3")
    assert estimate.item() == pytest.approx(10686474581493.46, rel=1e-12)  # e^30 - 31


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vanished_token_gives_a_finite_number_and_gradient(estimator: str, dtype: torch.dtype) -> None:
    logprobs = torch.tensor([-1000.0, 0.0, -1000.0], dtype=dtype, requires_grad=True)
    estimate = kl_estimate(logprobs, torch.tensor([0.0, -1000.0, -1000.0], dtype=dtype), estimator)
    assert estimate.isfinite().all()
    assert gradient(estimate, logprobs)[0].isfinite().all()


def test_k3_is_never_negative_and_k1_may_be() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 10_000, generator=generator)
    assert kl_estimate(policy, reference, "k3").min() >= 0
    assert kl_estimate(policy, reference, "k1").min() < 0
    for estimator in ESTIMATORS:
        close(kl_estimate(policy, policy, estimator).abs().max(), 0.0, atol=0.0)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2 or k3"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(12.0, 0.151536), (3.0, 0.148464), (6.0, 0.15), (6.3, 0.150384), (0.0, 0.148464), (-1.0, 0.148464)],
)
def test_controller(kl: float, expected: float) -> None:
    close(updated_kl_coef(0.15, kl, target_kl=6.0, horizon=10_000, num_responses=512), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("kl", "updates", "expected", "atol"), [(12.0, 10, 0.1660874668, 1e-9), (0.0, 26, 0.1148, 5e-5)]
)
def test_controller_over_many_updates(kl: float, updates: int, expected: float, atol: float) -> None:
    kl_coef = 0.15
    for _ in range(updates):
        kl_coef = updated_kl_coef(kl_coef, kl, 6.0, 10_000, 512)
    close(kl_coef, expected, atol)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_no_number_leaves_the_coefficient(kl: float) -> None:
    assert updated_kl_coef(0.15, kl, 6.0, 10_000, 512) == 0.15


def test_differences_that_rounding_explains_have_neither_value_nor_gradient() -> None:
    reference = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    difference = torch.tensor([9e-5, -9e-5, 2e-4, -1.0])
    policy = (reference + difference).requires_grad_()
    near = without_rounding(reference, policy)
    for estimator, slope in (("k2", [0.0, 0.0, 2e-4, -1.0]), ("k3", [0.0, 0.0, 1 - math.exp(-2e-4), 1 - math.e])):
        estimate = kl_estimate(policy, near, estimator)
        assert estimate[:2].tolist() == [0.0, 0.0]
        assert bool((estimate[2:] > 0).all())
        close(torch.autograd.grad(estimate.sum(), policy)[0], slope, atol=1e-6)
