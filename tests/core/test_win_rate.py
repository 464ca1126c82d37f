"""The length-controlled win rate: what remains of a win rate when both answers are of one length."""

import math

import pytest
import torch

from keel.core.win_rate import length_controlled_win_rate

from .expect import close


def rate(wins: list[float], longer_by: list[float], weights: list[float] | None = None) -> float:
    w = torch.ones(len(wins)) if weights is None else torch.tensor(weights)
    return float(length_controlled_win_rate(torch.tensor(wins), torch.tensor(longer_by), w))


def test_lengths_that_say_nothing_leave_the_win_rate_as_it_is():
    assert rate([1.0] * 30 + [0.0] * 10, [0.0] * 40) == pytest.approx(0.75, abs=2e-3)
    assert rate([1.0, 1.0, 1.0, 0.0] * 10, [7.0, 7.0, 7.0, 7.0, -7.0, -7.0, -7.0, -7.0] * 5) == pytest.approx(
        0.75, abs=2e-3
    )


def test_two_lengths_by_hand():
    """80% won where ours is longer, 40% where it is shorter: both logits are met, and the middle of them is a."""
    wins = [1.0] * 400 + [0.0] * 100 + [1.0] * 200 + [0.0] * 300
    middle = (math.log(4) + math.log(2 / 3)) / 2
    assert rate(wins, [5.0] * 500 + [-5.0] * 500) == pytest.approx(1 / (1 + math.exp(-middle)), abs=1e-4)


def test_a_judge_who_only_counts_words_sees_no_difference():
    """Ours is always longer, by 1 to 9, and wins as sigmoid(tanh(d / 2.582)) has it: at equal length it is a draw."""
    gaps = torch.arange(1.0, 10.0)
    wins = torch.sigmoid(torch.tanh(gaps / gaps.std(correction=0)))
    assert float(wins.mean()) > 0.6
    assert float(length_controlled_win_rate(wins, gaps, torch.full((9,), 1e4))) == pytest.approx(0.5, abs=1e-4)


def test_the_other_side_has_the_rest():
    wins, longer_by = [1.0, 0.5, 0.0, 1.0, 1.0, 0.0], [3.0, -1.0, -4.0, 6.0, 0.0, 2.0]
    other = rate([1 - win for win in wins], [-gap for gap in longer_by])
    assert rate(wins, longer_by) + other == pytest.approx(1.0, abs=1e-9)


def test_whole_numbers_of_repetitions_are_weights():
    wins, longer_by = [1.0, 0.0, 1.0, 0.0], [2.0, -2.0, -2.0, 2.0]
    repeated = rate([1.0, 1.0, 1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, -2.0, -2.0, 2.0])
    assert rate(wins, longer_by, [3.0, 1.0, 1.0, 1.0]) == pytest.approx(repeated, abs=0.02)  # the spread differs


def test_each_row_of_weights_is_a_regression_of_its_own():
    wins, longer_by = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, -1.0, 0.5, -0.5])
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 2.0, 0.0, 1.0]])
    both = length_controlled_win_rate(wins, longer_by, weights)
    close(both, [float(length_controlled_win_rate(wins, longer_by, row)) for row in weights], atol=1e-9)


@pytest.mark.parametrize("wins", [[1.0] * 50, [0.0] * 50])
def test_all_won_or_lost_stays_a_number(wins: list[float]):
    found = rate(wins, [float(i % 5) for i in range(50)])
    assert abs(found - wins[0]) < 0.01


def test_length_alone_telling_who_wins_stays_a_number():
    assert rate([1.0, 1.0, 0.0, 0.0], [1.0, 2.0, -1.0, -2.0]) == pytest.approx(0.5, abs=1e-6)
