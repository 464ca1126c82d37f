"""Losses on human comparisons."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from keel.core.preferences import (
    bradley_terry_loss,
    implicit_rewards,
    ipo_loss,
    log_odds,
    odds_ratio_loss,
    plackett_luce_loss,
)

from .expect import close, gradient

NAN = float("nan")


@pytest.mark.parametrize(
    ("difference", "loss", "derivative"),
    [
        (0.0, 0.6931471806, -0.5),
        (1.0, 0.3132616875, -0.2689414214),
        (-1.0, 1.3132616875, -0.7310585786),
        (-1000.0, 1000.0, -1.0),
    ],
)
def test_bradley_terry(difference: float, loss: float, derivative: float) -> None:
    chosen = torch.tensor([difference + 5.0], requires_grad=True)
    rejected = torch.tensor([5.0], requires_grad=True)
    value = bradley_terry_loss(chosen, rejected)
    close(value, [loss])
    of_chosen, of_rejected = gradient(value, chosen, rejected)
    close(of_chosen, [derivative])
    close(of_rejected, [-derivative])


def test_a_sure_pair_still_has_a_tiny_loss() -> None:
    assert bradley_terry_loss(torch.tensor([100.0]), torch.tensor([0.0])).item() == pytest.approx(3.72e-44, rel=1e-3)


@pytest.mark.parametrize(("p", "odds", "slope"), [(0.5, 1.0, 2.0), (0.75, 3.0, 4.0), (0.2, 0.25, 1.25)])
def test_log_odds(p: float, odds: float, slope: float) -> None:
    """The derivative of log(p / (1 - p)) in log p is 1 / (1 - p)."""
    mean_logprobs = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
    found = log_odds(mean_logprobs)
    close(found, [math.log(odds)])
    close(gradient(found, mean_logprobs)[0], [slope])


def test_the_odds_of_a_certain_response_are_finite() -> None:
    assert log_odds(torch.tensor([0.0, -1e-12])).tolist() == pytest.approx([13.8155] * 2, abs=0.1)


def test_odds_ratio_loss() -> None:
    """Odds of 3 and 1: 0.5 * -log(3 / 4)."""
    close(odds_ratio_loss(torch.tensor([math.log(3)]), torch.tensor([0.0]), 0.5), [0.1438410362], atol=1e-7)


def test_margin() -> None:
    close(bradley_terry_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0])), [1.3132616875])


def test_only_the_difference_counts() -> None:
    chosen, rejected = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0])
    close(bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected).tolist(), atol=1e-12)


def ordered_loss(ordered: Tensor, mask: Tensor | None = None) -> Tensor:
    """The loss of scores in ranked order, best first, without ties. [N, K] -> [N]"""
    ranks = torch.arange(ordered.shape[1]).expand(ordered.shape)
    return plackett_luce_loss(ordered, ranks, torch.ones_like(ordered, dtype=torch.bool) if mask is None else mask)


def listwise(scores: list[float], ranking: tuple[int, ...]) -> Tensor:
    return ordered_loss(torch.tensor([[scores[i] for i in ranking]]))


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of `keel dpo`: Bradley-Terry of implicit rewards. Log-probs of responses [N] each -> [N]"""
    rewards = implicit_rewards(chosen, ref_chosen, beta), implicit_rewards(rejected, ref_rejected, beta)
    return bradley_terry_loss(*rewards, label_smoothing=label_smoothing)


def test_the_probabilities_of_all_rankings() -> None:
    expected = [0.48633011, 0.17891085, 0.21555612, 0.02917235, 0.06581763, 0.02421295]
    losses = torch.cat([listwise([2.0, 1.0, 0.0], ranking) for ranking in itertools.permutations(range(3))])
    close(torch.exp(-losses), expected)
    close(torch.exp(-losses).sum(), 1.0, atol=1e-12)
    close(losses[0], 0.7208676520)


@pytest.mark.parametrize(
    ("ordered", "expected"),
    [
        ([2.0, 1.0, 0.0], [-0.33475904, -0.02421295, 0.35897199]),
        ([0.0, 1.0, 2.0], [-0.90996943, -0.48633011, 1.39629953]),  # the worst order
    ],
)
def test_gradient(ordered: list[float], expected: list[float]) -> None:
    scores = torch.tensor([ordered], requires_grad=True)
    loss = ordered_loss(scores)
    close(gradient(loss, scores)[0], [expected])


@pytest.mark.parametrize(("chosen", "rejected"), [(1.0, 0.0), (0.0, 1.0), (-3.0, 4.0)])
def test_two_answers_are_a_bradley_terry_pair(chosen: float, rejected: float) -> None:
    pair = bradley_terry_loss(torch.tensor([chosen]), torch.tensor([rejected]))
    close(listwise([chosen, rejected], (0, 1)), pair.tolist(), atol=1e-12)


def test_the_pairs_of_a_ranking_are_another_loss() -> None:
    pairs = bradley_terry_loss(torch.tensor([2.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]))
    close(pairs.mean(), 0.2511504620)


@pytest.mark.parametrize("pad", [0.0, 1e9, -1e9, NAN])
def test_masked_answers_take_no_part(pad: float) -> None:
    """Rankings of three, two (the pad in the middle), two (the pad in front) and one answer in one batch."""
    scores = torch.tensor([[2.0, 1.0, 0.0, pad], [1.0, pad, 0.0, pad], [pad, pad, 0.0, 1.0], [pad, 5.0, pad, pad]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    scores.requires_grad_()
    loss = ordered_loss(scores, mask)
    close(loss, [0.7208676520, 0.3132616875, 1.3132616875, 0.0])
    expected = [
        [-0.33475904, -0.02421295, 0.35897199, 0.0],
        [-0.26894142, 0.0, 0.26894142, 0.0],
        [0.0, 0.0, -0.73105858, 0.73105858],
        [0.0, 0.0, 0.0, 0.0],
    ]
    close(gradient(loss, scores)[0], expected)


def test_huge_scores_stay_finite() -> None:
    scores = torch.tensor([[-1000.0, 0.0, 1000.0]], requires_grad=True)
    loss = ordered_loss(scores)
    close(loss, [3000.0])
    close(gradient(loss, scores)[0], [[-1.0, -1.0, 2.0]])


@pytest.mark.parametrize("preferred", [0, 1])
def test_a_reward_model_recovers_known_preferences(preferred: int) -> None:
    """Two answers, one preferred in 75 of 100 comparisons: the margin becomes ln 3; swapped, its sign."""
    scores = torch.zeros(2, requires_grad=True)
    winners = torch.tensor([preferred] * 75 + [1 - preferred] * 25)
    optimizer = torch.optim.SGD([scores], lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss = bradley_terry_loss(scores[winners], scores[1 - winners]).mean()
        loss.backward()
        optimizer.step()
    margin = scores.detach()[preferred] - scores.detach()[1 - preferred]
    close(margin, 1.0986123, atol=1e-6)
    close(loss, 0.5623351, atol=1e-7)
    assert (scores[winners] > scores[1 - winners]).double().mean() == 0.75


@pytest.mark.parametrize(
    ("h", "label_smoothing", "loss"),
    [(0.0, 0.0, 0.6931471806), (1.0, 0.0, 0.3132616875), (1.0, 0.1, 0.4132616875), (-1.0, 0.1, 1.2132616875)],
)
def test_dpo_is_bradley_terry_on_log_ratios(h: float, label_smoothing: float, loss: float) -> None:
    beta = 0.1
    logratios = torch.tensor([-7.0 + h / beta]), torch.tensor([-9.0]), torch.tensor([-8.0]), torch.tensor([-10.0])
    close(dpo_loss(*logratios, beta, label_smoothing), [loss])


def test_dpo_with_smoothed_labels_is_least_where_the_model_is_as_sure_as_the_labels() -> None:
    zero = torch.zeros(1)
    chosen = torch.tensor([math.log(9.0)], requires_grad=True)  # sigma(h) = .9
    close(gradient(dpo_loss(chosen, zero, zero, zero, 1.0, 0.1), chosen)[0], [0.0])


@pytest.mark.parametrize("difference", [-3.0, 0.0, 0.4, 50.0])
def test_a_smoothed_label_is_the_mean_over_both_directions(difference: float) -> None:
    """One pair in ten the wrong way round: nine losses of one direction and one of the other, over ten."""
    one, other = torch.tensor([difference]), torch.tensor([0.0])
    mixed = (9 * bradley_terry_loss(one, other) + bradley_terry_loss(other, one)) / 10
    close(bradley_terry_loss(one, other, label_smoothing=0.1), mixed.tolist())


def test_dpo_at_the_start_is_log_2_and_pulls_by_half_of_beta() -> None:
    start = torch.tensor([-7.0]), torch.tensor([-9.0])
    chosen, rejected = (logprob.clone().requires_grad_() for logprob in start)
    loss = dpo_loss(chosen, rejected, *start, 0.3)
    close(loss, [0.6931471806])
    close(torch.cat(gradient(loss, chosen, rejected)), [-0.15, 0.15])


def test_an_implicit_reward_is_the_scaled_log_ratio() -> None:
    close(implicit_rewards(torch.tensor([-4.0, -2.0]), torch.tensor([-6.0, -1.0]), 0.25), [0.5, -0.25])


@pytest.mark.parametrize(
    ("h", "loss", "derivative"),  # beta = .1: the log-ratios of a pair are to end 5 apart
    [(0.0, 25.0, -10.0), (5.0, 0.0, 0.0), (6.0, 1.0, 2.0), (-5.0, 100.0, -20.0)],
)
def test_ipo_is_least_at_a_difference_of_log_ratios_of_1_over_2_beta(h: float, loss: float, derivative: float) -> None:
    logratio = torch.tensor([h - 3.0], requires_grad=True)
    value = ipo_loss(0.1 * logratio, torch.tensor([0.1 * -3.0]), 0.1)
    close(value, [loss])
    close(gradient(value, logratio)[0], [derivative])


@pytest.mark.parametrize(("share", "difference"), [(1.0, 5.0), (0.75, 2.5), (0.5, 0.0), (0.0, -5.0)])
def test_ipo_never_drifts_away_however_sure_the_pairs_are(share: float, difference: float) -> None:
    """The mean over raters of whom `share` prefer the first is least at (share - 1/2) / beta (Azar et al. 2023)."""
    first = torch.tensor([0.1 * difference], requires_grad=True)
    second = torch.zeros(1)
    value = share * ipo_loss(first, second, 0.1) + (1 - share) * ipo_loss(second, first, 0.1)
    close(gradient(value, first)[0], [0.0])


def test_preference_losses_refuse_shapes_that_would_broadcast() -> None:
    one, two = torch.ones(1), torch.ones(2)
    for loss in (
        lambda: bradley_terry_loss(two, one),
        lambda: bradley_terry_loss(two, two, one),
        lambda: plackett_luce_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3, dtype=torch.bool)),
        lambda: ipo_loss(two, one, 0.1),
        lambda: implicit_rewards(two, one, 0.1),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            loss()
