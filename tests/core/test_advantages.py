"""GAE and returns, baselines of groups."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from keel.core.advantages import discounted_returns, gae, grpo, rloo

from .expect import close

REWARDS, VALUES = [0.1, -0.2, 0.3, 1.0], [0.5, 0.4, -0.1, 0.2]
NAN = float("nan")
Estimator = Callable[[Tensor, int], Tensor]


def one_row(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float, bootstrap: float | None = None
) -> tuple[Tensor, Tensor]:
    mask = torch.ones(1, len(rewards), dtype=torch.bool)
    last = None if bootstrap is None else torch.tensor([bootstrap])
    advantages, returns = gae(torch.tensor([rewards]), torch.tensor([values]), mask, gamma, gae_lambda, last)
    return advantages[0], returns[0]


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "bootstrap", "expected"),
    [
        (1.0, 0.95, None, [0.5624, 0.592, 1.36, 0.8]),
        (0.99, 0.9, None, [0.41381021, 0.4689228, 1.3108, 0.8]),
        (1.0, 0.0, None, [0.0, -0.7, 0.6, 0.8]),  # A2C: r_t + V_{t+1} - V_t
        (1.0, 1.0, None, [0.7, 0.7, 1.4, 0.8]),  # reward to go - V_t
        (1.0, 0.95, 0.7, [1.1625625, 1.22375, 2.025, 1.5]),  # cut off, and the critic says 0.7 would have followed
        (1.0, 0.95, 0.0, [0.5624, 0.592, 1.36, 0.8]),
    ],
)
def test_gae(gamma: float, gae_lambda: float, bootstrap: float | None, expected: list[float]) -> None:
    close(one_row(REWARDS, VALUES, gamma, gae_lambda, bootstrap)[0], expected)


def test_returns_are_advantages_plus_values() -> None:
    close(one_row(REWARDS, VALUES, 1.0, 0.95)[1], [1.0624, 0.992, 1.26, 1.0])


def test_a_response_of_one_token() -> None:
    close(one_row([2.0], [0.5], 0.9, 0.8)[0], [1.5])


@pytest.mark.parametrize("garbage", [999.0, 1e9, -1e9, NAN, float("inf")])
def test_a_gap_in_the_mask_is_stepped_over(garbage: float) -> None:
    rewards = torch.tensor([[0.0, 0.0, garbage, 0.0, 1.0]])
    values = torch.tensor([[0.1, 0.2, garbage, 0.4, 0.5]])
    mask = torch.tensor([[True, True, False, True, True]])
    advantages, returns = gae(rewards, values, mask, 0.99, 0.95)
    close(advantages, [[0.78232438, 0.72761762, 0.0, 0.56525, 0.5]])
    close(returns, [[0.88232438, 0.92761762, 0.0, 0.96525, 1.0]])


@pytest.mark.parametrize("pad", [0.0, 1e9, -1e9, NAN])
def test_padding_on_either_side_changes_nothing(pad: float) -> None:
    rewards = torch.tensor([[*REWARDS, pad], [pad, *REWARDS]])
    values = torch.tensor([[*VALUES, pad], [pad, *VALUES]])
    mask = torch.tensor([[True] * 4 + [False], [False] + [True] * 4])
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95, torch.tensor([0.7, 0.0]))
    close(advantages, [[1.1625625, 1.22375, 2.025, 1.5, 0.0], [0.0, 0.5624, 0.592, 1.36, 0.8]])
    close(returns, [[1.6625625, 1.62375, 1.925, 1.7, 0.0], [0.0, 1.0624, 0.992, 1.26, 1.0]])


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.97, 0.6), (0.9, 0.0), (0.9, 1.0)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma: float, gae_lambda: float) -> None:
    """An independent route, row by row on the counted tokens alone: A_t = sum_k (gamma lambda)^k delta_{t+k}."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 8, generator=generator)
    bootstrap = torch.randn(6, generator=generator)
    mask = torch.rand(6, 8, generator=generator) < 0.7
    advantages = gae(rewards, values, mask, gamma, gae_lambda, bootstrap)[0]
    for row in range(6):
        r, v = rewards[row][mask[row]].tolist(), [*values[row][mask[row]].tolist(), bootstrap[row].item()]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [
            sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))
        ]
        close(advantages[row][mask[row]], expected, atol=1e-12)


def test_discounted_returns_need_no_critic() -> None:
    mask = torch.tensor([[True, True, True, False]])
    close(discounted_returns(torch.tensor([[1.0, 0.0, 2.0, NAN]]), mask, 0.5), [[1.5, 1.0, 2.0, 0.0]])


def test_gae_refuses_shapes_that_would_broadcast() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="shapes differ"):
        gae(torch.ones(2, 3), torch.ones(1, 3), mask, 1.0, 1.0)
    with pytest.raises(ValueError, match="shapes differ"):
        gae(torch.ones(2, 3), torch.ones(2, 3), mask, 1.0, 1.0, bootstrap_values=torch.ones(1))


# A bandit with three arms, uniform policy, scores 1, 0, 0.
ARM_SCORES = [1.0, 0.0, 0.0]
TRUE_GRADIENT = [0.2222222222, -0.1111111111, -0.1111111111]


def mean_baseline(scores: Tensor, group_size: int) -> Tensor:
    return grpo(scores, group_size, normalize_std=False)


@pytest.mark.parametrize(
    ("estimator", "group_size", "factor"),
    [
        (rloo, 2, 1.0),
        (rloo, 4, 1.0),
        (mean_baseline, 2, 0.5),
        (mean_baseline, 4, 0.75),
        (grpo, 2, 0.70711),
        (grpo, 4, 1.41068),
    ],
)
def test_expected_gradient_over_every_group(estimator: Estimator, group_size: int, factor: float) -> None:
    """E[mean_i A_i grad log pi(arm_i)] as a multiple of the true gradient, all 3^k groups enumerated."""
    groups = torch.tensor(list(itertools.product(range(3), repeat=group_size)))
    advantages = estimator(torch.tensor(ARM_SCORES)[groups].reshape(-1), group_size).reshape(groups.shape)
    score_function = torch.eye(3)[groups] - 1 / 3  # d log pi(arm) / d logits
    expected_gradient = (advantages.unsqueeze(-1) * score_function).mean(dim=(0, 1))
    close(expected_gradient, [factor * g for g in TRUE_GRADIENT], atol=1e-5 if estimator is grpo else 1e-9)


@pytest.mark.parametrize(
    ("estimator", "scores", "expected"),
    [
        (rloo, [1, 0, 0, 1], [0.6666666667, -0.6666666667, -0.6666666667, 0.6666666667]),
        (mean_baseline, [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
        (grpo, [1, 0, 0, 1], [0.8660239038, -0.8660239038, -0.8660239038, 0.8660239038]),
        (rloo, [3, 0], [3.0, -3.0]),
        (grpo, [3, 0], [0.7071064479, -0.7071064479]),
    ],
)
def test_hand_computed_groups(estimator: Estimator, scores: list[float], expected: list[float]) -> None:
    close(estimator(torch.tensor(scores, dtype=torch.float64), len(scores)), expected)


@pytest.mark.parametrize("estimator", [rloo, mean_baseline, grpo])
@pytest.mark.parametrize("score", [0.0, 0.1, 0.3, -7.7, 1e6 + 0.1])
@pytest.mark.parametrize("group_size", [2, 3, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_give_exact_zeros(estimator: Estimator, score: float, group_size: int, dtype: torch.dtype) -> None:
    """Dividing rounding error by (std + 1e-6) would make a signal out of nothing."""
    assert estimator(torch.full((2 * group_size,), score, dtype=dtype), group_size).eq(0).all()


@pytest.mark.parametrize("estimator", [rloo, mean_baseline, grpo])
def test_groups_are_adjacent_rows_and_do_not_mix(estimator: Estimator) -> None:
    scores = torch.tensor([1.0, 2.0, 4.0, 10.0, 20.0, 30.0])
    together = estimator(scores, 3)
    close(together, torch.cat([estimator(scores[:3], 3), estimator(scores[3:], 3)]).tolist(), atol=1e-12)


@pytest.mark.parametrize("estimator", [rloo, grpo])
def test_a_group_of_one_is_refused(estimator: Estimator) -> None:
    with pytest.raises(ValueError, match="group_size >= 2"):
        estimator(torch.ones(4), 1)
    with pytest.raises(ValueError, match="do not divide"):
        estimator(torch.ones(4), 3)


@pytest.mark.parametrize("estimator", [rloo, grpo, mean_baseline])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_scores_that_differ_by_rounding_are_equal(estimator: Estimator, size: float) -> None:
    """The second group differs by a thousandth of its size and counts, whatever the size of the first."""
    scores = torch.tensor([1.0, 1.0 + 5e-7, 1.0 - 3e-7, 1.0, 0.001, 0.001001, 0.001002, 0.001003]) * size
    advantages = estimator(scores, 4)
    assert not advantages[:4].any()
    assert bool((advantages[4:] != 0).all())
