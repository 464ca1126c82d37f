"""Figures of an update, as docs/metrics.md defines them."""

import math

import pytest
import torch

from keel.core.diagnostics import approx_kl, clipfrac, explained_variance
from keel.core.masked import masked_mean

from .expect import close


def test_approx_kl_is_ratio_minus_one_minus_log_ratio() -> None:
    new_logprobs = torch.tensor([[math.log(0.5), math.log(0.2), math.log(0.4)]])
    logprobs = torch.tensor([[math.log(0.5), math.log(0.4), math.log(0.2)]])
    close(approx_kl(new_logprobs, logprobs), [[0.0, 0.1931471806, 0.3068528194]])


def test_approx_kl_estimates_the_divergence_of_the_sampling_policy_from_the_new_one() -> None:
    """Its mean under the sampling policy .5, .3, .2 is KL(sampling || new), here to a uniform new policy."""
    sampling, new = torch.tensor([0.5, 0.3, 0.2]), torch.full((3,), 1 / 3)
    close((sampling * approx_kl(new.log(), sampling.log())).sum(), 0.0689592746)


@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
def test_approx_kl_of_a_huge_step_is_huge_and_finite(log_ratio: float) -> None:
    estimate = approx_kl(torch.full((1, 1), log_ratio, dtype=torch.float32), torch.zeros(1, 1, dtype=torch.float32))
    assert estimate.isfinite().all()
    assert estimate.item() > 900


@pytest.mark.parametrize(
    ("advantage", "ratio", "counted"),
    [
        (1.0, 1.5, 1.0),
        (1.0, 1.1, 0.0),
        (1.0, 0.5, 0.0),  # outside the range, but the unclipped term is the one used
        (-1.0, 0.5, 1.0),
        (-1.0, 0.9, 0.0),
        (-1.0, 1.5, 0.0),
        (0.0, 1.5, 0.0),
    ],
)
def test_clipfrac_counts_tokens_without_a_gradient(advantage: float, ratio: float, counted: float) -> None:
    new_logprobs = torch.tensor([[math.log(ratio)]])
    close(clipfrac(new_logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2, 0.2), [[counted]])


def test_before_the_first_update_nothing_has_moved() -> None:
    logprobs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) - 2
    assert approx_kl(logprobs, logprobs).eq(0).all()
    assert clipfrac(logprobs, logprobs, torch.ones(3, 4), 0.2, 0.2).eq(0).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], 1.0),
        ([11.0, 12.0, 13.0], 1.0),  # an offset is not seen: the measure is of variance
        ([2.0, 2.0, 2.0], 0.0),
        ([3.0, 2.0, 1.0], -3.0),
    ],
)
@pytest.mark.parametrize("pad", [0.0, 1e9, float("nan")])
def test_explained_variance(values: list[float], expected: float, pad: float) -> None:
    mask = torch.tensor([[True, True, False, True]])
    padded, returns = (torch.tensor([[*x[:2], pad, x[2]]]) for x in (values, [1.0, 2.0, 3.0]))
    close(explained_variance(padded, returns, mask), expected)


def test_explained_variance_of_returns_that_do_not_vary_is_no_number() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), mask).isnan()


@pytest.mark.parametrize("pad", [1e9, float("nan"), float("inf")])
def test_metrics_do_not_see_padding(pad: float) -> None:
    mask = torch.tensor([[True, False], [True, True]])
    new_logprobs = torch.tensor([[math.log(0.2), pad], [math.log(0.4), math.log(0.5)]])
    logprobs = torch.tensor([[math.log(0.4), -pad], [math.log(0.2), math.log(0.5)]])
    close(masked_mean(approx_kl(new_logprobs, logprobs), mask), 0.5 / 3)
    close(masked_mean(clipfrac(new_logprobs, logprobs, torch.ones(2, 2), 0.2, 0.2), mask), 1 / 3)
