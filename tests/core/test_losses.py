"""Policy and value losses."""

import math

import pytest
import torch
from torch import Tensor

from keel.core.losses import (
    aggregation_weights,
    clipped_policy_loss,
    clipped_weight_loss,
    likelihood_ratio,
    policy_gradient_loss,
    sequence_level_logprobs,
    truncated_importance_weights,
    value_loss,
)
from keel.core.masked import masked_sum, whiten

from .expect import close, gradient


def surrogate(advantage: float, ratio: float, dual_clip: float | None = None) -> tuple[Tensor, Tensor]:
    """The loss at one ratio, and its derivative in the new log-prob."""
    logprobs = torch.tensor([[-1.3]])
    new_logprobs = (logprobs + math.log(ratio)).requires_grad_()
    loss = clipped_policy_loss(new_logprobs, logprobs, torch.tensor([[advantage]]), 0.2, 0.2, dual_clip)
    return loss, gradient(loss, new_logprobs)[0]


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "derivative"),
    [
        (1.0, 0.5, -0.5, -0.5),
        (1.0, 0.9, -0.9, -0.9),
        (1.0, 1.0, -1.0, -1.0),
        (1.0, 1.1, -1.1, -1.1),
        (1.0, 1.5, -1.2, 0.0),
        (-1.0, 0.5, 0.8, 0.0),
        (-1.0, 0.9, 0.9, 0.9),
        (-1.0, 1.0, 1.0, 1.0),
        (-1.0, 1.1, 1.1, 1.1),
        (-1.0, 1.5, 1.5, 1.5),
        (0.0, 0.5, 0.0, 0.0),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clipped_surrogate(advantage: float, ratio: float, loss: float, derivative: float) -> None:
    value, slope = surrogate(advantage, ratio)
    close(value, [[loss]])
    close(slope, [[derivative]])


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "derivative"),
    [(-1.0, 5.0, 3.0, 0.0), (-1.0, 2.0, 2.0, 2.0), (1.0, 5.0, -1.2, 0.0), (1.0, 0.1, -0.1, -0.1)],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens_only(
    advantage: float, ratio: float, loss: float, derivative: float
) -> None:
    value, slope = surrogate(advantage, ratio, dual_clip=3.0)
    close(value, [[loss]])
    close(slope, [[derivative]])


def test_three_tokens_at_once() -> None:
    ratio = torch.tensor([[0.5, 1.0, 1.5]])
    loss = clipped_policy_loss(ratio.log(), torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 2.0]]), 0.2, 0.2)
    close(loss, [[-0.5, 1.0, -2.4]])
    close(loss.mean(), -0.6333333333)


def test_the_two_ends_of_the_range_are_set_apart() -> None:
    ratio = torch.tensor([[0.5, 2.0]])
    loss = clipped_policy_loss(ratio.log(), torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), 0.1, 0.4)
    close(loss, [[0.9, -1.4]])


def test_at_the_very_edge_the_gradient_flows() -> None:
    """A range of 0 puts both edges at a ratio of exactly 1."""
    new_logprobs = torch.zeros(1, 2, requires_grad=True)
    loss = clipped_policy_loss(new_logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), 0.0, 0.0)
    close(gradient(loss, new_logprobs)[0], [[-1.0, 1.0]])


@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0, 1e6])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_huge_step_stays_finite(
    log_ratio: float, advantage: float, dual_clip: float | None, dtype: torch.dtype
) -> None:
    new_logprobs = torch.full((1, 1), log_ratio, dtype=dtype, requires_grad=True)
    logprobs, advantages = torch.zeros(1, 1, dtype=dtype), torch.full((1, 1), advantage, dtype=dtype)
    loss = clipped_policy_loss(new_logprobs, logprobs, advantages, 0.2, 0.2, dual_clip)
    assert loss.isfinite().all()
    assert gradient(loss, new_logprobs)[0].isfinite().all()


def test_ratio_is_new_over_stored() -> None:
    close(likelihood_ratio(torch.tensor([math.log(0.6)]), torch.tensor([math.log(0.3)])), [2.0])


def first_pass() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits that are being trained, their log-probs (new and stored, equal), advantages, mask."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 5, 6, generator=generator, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1], [4]])
    advantages = whiten(torch.randn(4, 5, generator=generator), mask)
    new_logprobs = logits.log_softmax(-1)[..., 0]
    return logits, new_logprobs, advantages, mask


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_on_the_first_pass_ppo_has_the_gradient_of_a2c(dual_clip: float | None) -> None:
    logits, new_logprobs, advantages, mask = first_pass()
    stored = new_logprobs.detach()
    ppo = clipped_policy_loss(new_logprobs, stored, advantages, 0.2, 0.2, dual_clip)
    a2c = policy_gradient_loss(new_logprobs, advantages)
    (of_ppo,) = torch.autograd.grad(masked_sum(ppo, mask), logits, retain_graph=True)
    (of_a2c,) = torch.autograd.grad(masked_sum(a2c, mask), logits)
    close(of_ppo, of_a2c.tolist(), atol=1e-12)
    close(masked_sum(ppo, mask), 0.0, atol=1e-12)  # minus the sum of the whitened advantages


@pytest.mark.parametrize(
    ("advantage", "logprob", "loss", "derivative"), [(2.0, -0.5, 1.0, -2.0), (-3.0, -0.5, -1.5, 3.0)]
)
def test_policy_gradient_loss(advantage: float, logprob: float, loss: float, derivative: float) -> None:
    new_logprobs = torch.tensor([logprob], requires_grad=True)
    value = policy_gradient_loss(new_logprobs, torch.tensor([advantage]))
    close(value, [loss])
    close(gradient(value, new_logprobs)[0], [derivative])


@pytest.mark.parametrize(
    ("stored", "new", "target", "clip", "loss", "derivative"),
    [
        (0.0, 1.0, 0.5, 0.2, 0.125, 0.5),
        (0.0, 0.5, 1.0, 0.2, 0.32, 0.0),
        (0.0, -1.0, 1.0, 0.2, 2.0, -2.0),
        (0.0, 0.1, 1.0, 0.2, 0.405, -0.9),
        (0.0, 0.5, 1.0, None, 0.125, -0.5),
        (1e6, 1e6 + 0.5, 1e6 + 1.0, 0.2, 0.32, 0.0),
    ],
)
def test_value_loss(
    stored: float, new: float, target: float, clip: float | None, loss: float, derivative: float
) -> None:
    new_values = torch.tensor([[new]], requires_grad=True)
    value = value_loss(new_values, torch.tensor([[stored]]), torch.tensor([[target]]), clip)
    close(value, [[loss]])
    close(gradient(value, new_values)[0], [[derivative]])


@pytest.mark.parametrize("pad", [float("nan"), 1e9])
def test_what_lies_under_the_mask_moves_no_loss_and_no_gradient(pad: float) -> None:
    def outcome(fill: float) -> list[Tensor]:
        logits, new_logprobs, advantages, mask = first_pass()
        stored = (new_logprobs.detach() - 0.1).masked_fill(~mask, fill)
        losses = clipped_policy_loss(new_logprobs, stored, advantages, 0.2, 0.2)
        losses = losses + value_loss(new_logprobs, stored, stored + 1, 0.05)
        total = masked_sum(losses, mask)
        return [total, torch.autograd.grad(total, logits)[0][mask]]

    for with_garbage, clean in zip(outcome(pad), outcome(0.0), strict=True):
        close(with_garbage, clean.tolist(), atol=0.0)


def test_losses_refuse_shapes_that_would_broadcast() -> None:
    column, square = torch.ones(2, 1), torch.ones(2, 2)
    for loss in (
        lambda: policy_gradient_loss(square, column),
        lambda: clipped_policy_loss(square, square, column, 0.2, 0.2),
        lambda: value_loss(square, column, square),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            loss()


def test_the_ratio_of_a_response_is_the_geometric_mean_of_its_tokens() -> None:
    """Ratios 4 and 1 (GSPO: 2), then 1/8, 1, 1 (1/2). The gradient of a token's ratio is that of its log-prob."""
    new_logprobs = torch.tensor([-1.0, -2.0, -0.5, -0.25, -3.0], dtype=torch.float64, requires_grad=True)
    ratios = torch.tensor([4.0, 1.0, 0.125, 1.0, 1.0], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    stored = sequence_level_logprobs(new_logprobs, new_logprobs.detach() - ratios.log(), mask)
    ratio = likelihood_ratio(new_logprobs, stored)
    close(ratio, [2.0, 2.0, 0.5, 0.5, 0.5])
    close(gradient(ratio, new_logprobs)[0], [2.0, 2.0, 0.5, 0.5, 0.5])
    assert not stored.requires_grad


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("token", [1.0, 1.0]),
        ("sequence", [4 / 3, 4.0]),  # 12 tokens of 3 responses: 12 / (3 * 3), 12 / (3 * 1)
        ("constant", [0.5, 0.5]),  # 12 / (3 * 8)
    ],
)
def test_weights_of_an_aggregation(aggregation: str, weights: list[float]) -> None:
    """Responses of 3, 1 and (in another micro-batch) 8 tokens; one without a counted token."""
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
    found = aggregation_weights(mask, aggregation, 12.0, 3.0, 8)
    close(found, [weights[0]] * 3 + [weights[1]])


@pytest.mark.parametrize(
    ("advantage", "ratio", "weight"),
    [(1.0, 0.5, 0.8), (1.0, 1.1, 1.1), (1.0, 3.0, 1.4), (-1.0, 0.5, 0.8), (-2.0, 3.0, 1.4), (0.0, 3.0, 1.4)],
)
def test_clipped_weight(advantage: float, ratio: float, weight: float) -> None:
    """CISPO's gradient is minus the clipped ratio times the advantage; the ratio has none."""
    new_logprobs = torch.tensor([[-1.25]], requires_grad=True)
    loss = clipped_weight_loss(
        new_logprobs, torch.tensor([[-1.25 - math.log(ratio)]]), torch.tensor([[advantage]]), 0.2, 0.4
    )
    close(loss, [[1.25 * weight * advantage]], atol=1e-6)
    close(gradient(loss, new_logprobs)[0], [[-weight * advantage]], atol=1e-6)


def test_weights_are_ratios_up_to_the_cap() -> None:
    """Ratios 1, 3/2, 1/2, 4 and e^60, which stays finite."""
    trainer = torch.tensor([[math.log(0.2), math.log(0.6), math.log(0.1), math.log(0.8), 0.0]], requires_grad=True)
    sampler = torch.tensor([[math.log(0.2), math.log(0.4), math.log(0.2), math.log(0.2), -1000.0]])
    weights = truncated_importance_weights(trainer, sampler, 2.0)
    close(weights, [[1.0, 1.5, 0.5, 2.0, 2.0]], atol=1e-6)
    assert not weights.requires_grad
    close(truncated_importance_weights(trainer, sampler, 1.0), [[1.0, 1.0, 0.5, 1.0, 1.0]], atol=1e-6)


def test_without_a_cap_the_weights_are_one() -> None:
    weights = truncated_importance_weights(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -0.5]]), None)
    assert weights.tolist() == [[1.0, 1.0]]


def test_a_logprob_that_is_no_number_gives_no_weight_of_one() -> None:
    weights = truncated_importance_weights(torch.tensor([[-1.0]]), torch.tensor([[math.nan]]), 2.0)
    assert weights.isnan().all()
