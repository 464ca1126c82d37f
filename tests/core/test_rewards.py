"""From scores to rewards of tokens."""

import pytest
import torch

from keel.core.advantages import gae
from keel.core.rewards import overlong_penalties, place_scores, token_rewards

from .expect import close

MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])


def test_the_overlong_penalty_rises_to_the_limit() -> None:
    """DAPO with a limit of 20 and a soft range of 4 tokens."""
    lengths = torch.tensor([1, 16, 17, 18, 20])
    close(overlong_penalties(lengths, 20, 4), [0.0, 0.0, 0.25, 0.5, 1.0])
    close(overlong_penalties(lengths, 20, 0), [0.0] * 5)


def test_the_score_stands_on_the_last_counted_token() -> None:
    close(place_scores(torch.tensor([2.0, -1.0, 3.0]), MASK), [[0.0, 2.0, 0.0], [0.0, 0.0, -1.0], [3.0, 0.0, 0.0]])


def test_a_score_on_the_end_token_is_not_discounted_once_more() -> None:
    """With V = 0 and lambda = .95 a score of 2 on the second of two tokens gives 1.9, 2.0; placed behind the end token
    it would give 1.805, 1.9."""
    mask = torch.tensor([[True, True, False]])
    rewards = token_rewards(place_scores(torch.tensor([2.0]), mask), torch.zeros(1, 3), mask, kl_coef=0.0)
    close(gae(rewards, torch.zeros(1, 3), mask, 1.0, 0.95)[0], [[1.9, 2.0, 0.0]])


def test_rewards_are_the_score_minus_the_weighted_kl() -> None:
    kl = torch.tensor([[0.1, -0.2, 9.0], [1.0, 2.0, 3.0], [0.5, 9.0, 9.0]])
    rewards = token_rewards(place_scores(torch.tensor([2.0, -1.0, 3.0]), MASK), kl, MASK, kl_coef=0.5)
    close(rewards, [[-0.05, 2.1, 0.0], [-0.5, -1.0, -2.5], [2.75, 0.0, 0.0]])


def test_a_higher_kl_never_pays() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    scores = place_scores(torch.ones(1), mask)
    low, high = (token_rewards(scores, torch.full((1, 2), kl), mask, 0.3).sum() for kl in (0.1, 0.2))
    close(high - low, -0.06)


def test_segment_scores_come_already_placed_and_sum_to_the_answers_score() -> None:
    placed = torch.tensor([[0.5, 1.5, 0.0], [0.0, 0.0, -1.0], [3.0, 0.0, 0.0]])
    rewards = token_rewards(placed, torch.zeros(3, 3), MASK, kl_coef=0.5)
    close(rewards, placed.tolist())
    close(rewards.sum(1), [2.0, -1.0, 3.0])


@pytest.mark.parametrize("pad", [1e9, -1e9, float("nan"), float("inf")])
def test_what_lies_under_the_mask_is_never_paid(pad: float) -> None:
    kl = torch.full((3, 3), 0.1).masked_fill(~MASK, pad)
    expected = [[-0.05, 1.95, 0.0], [-0.05, -0.05, -1.05], [2.95, 0.0, 0.0]]
    placed = place_scores(torch.tensor([2.0, -1.0, 3.0]), MASK).masked_fill(~MASK, pad)
    close(token_rewards(placed, kl, MASK, kl_coef=0.5), expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="scores for 3 responses"):
        place_scores(torch.ones(2), MASK)
    with pytest.raises(ValueError, match="no counted token"):
        place_scores(torch.ones(1), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="shapes differ"):
        token_rewards(torch.ones(3, 2), torch.zeros(3, 3), MASK, 0.1)
