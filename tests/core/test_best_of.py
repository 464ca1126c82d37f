"""Best of n: the KL bound, and estimates from k answers that are those of all subsets."""

import math
from itertools import combinations

import pytest
import torch

from keel.core.best_of import best_of_kl, best_of_weights

from .expect import close


@pytest.mark.parametrize(
    ("n", "nats"), [(1, 0.0), (2, 0.1931471805599453), (4, 0.6362943611198906), (64, 3.1745080833593553)]
)
def test_the_kl_bound_is_log_n_minus_n_minus_one_over_n(n: int, nats: float):
    assert best_of_kl(n) == pytest.approx(nats, abs=1e-12)


def test_the_bound_is_the_kl_of_the_best_of_n_of_many_answers_of_which_each_is_as_likely():
    answers, n = 20_000, 4
    places = torch.arange(1, answers + 1, dtype=torch.float64)
    chosen = (places / answers) ** n - ((places - 1) / answers) ** n
    assert float((chosen * (chosen * answers).log()).sum()) == pytest.approx(best_of_kl(n), abs=1e-3)


def test_the_best_of_n_of_a_coin_lies_nearer_than_the_bound():
    """Four tosses: the better side turns up with probability 15/16."""
    assert 15 / 16 * math.log(15 / 8) + 1 / 16 * math.log(1 / 8) < best_of_kl(4)


def test_best_of_two_from_three_by_hand():
    close(best_of_weights(torch.tensor([[3.0, 1.0, 2.0]]), 2), [[2 / 3, 0.0, 1 / 3]])


def test_equal_scores_share_their_weight():
    close(best_of_weights(torch.tensor([[1.0, 2.0, 2.0]]), 2), [[0.0, 0.5, 0.5]])
    close(best_of_weights(torch.tensor([[5.0, 5.0, 5.0, 5.0]]), 3), [[0.25, 0.25, 0.25, 0.25]])


@pytest.mark.parametrize("n", range(1, 7))
def test_the_weighted_mean_is_that_of_all_subsets(n: int):
    torch.manual_seed(3)
    scores, others = torch.randn(2, 6), torch.randn(2, 6)
    found = (best_of_weights(scores, n) * others).sum(1)
    for row in range(2):
        chosen = [max(group, key=lambda i: float(scores[row, i])) for group in combinations(range(6), n)]
        assert float(found[row]) == pytest.approx(sum(float(others[row, i]) for i in chosen) / len(chosen))


@pytest.mark.parametrize("n", [0, 4])
def test_more_answers_than_there_are_is_refused(n: int):
    with pytest.raises(ValueError, match="from 3 responses"):
        best_of_weights(torch.zeros(1, 3), n)


def test_an_answer_without_a_score_has_no_place():
    with pytest.raises(ValueError, match="a response has no score"):
        best_of_weights(torch.tensor([[1.0, math.nan]]), 1)
