"""pass@k: against all subsets, and the value that the plug-in estimate misses."""

from itertools import combinations

import pytest
import torch

from keel.core.pass_at_k import pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_it_is_the_share_of_subsets_with_a_correct_response(n: int) -> None:
    for correct in range(n + 1):
        marks = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            subsets = [max(each) for each in combinations(marks, k)]
            found = pass_at_k(torch.tensor([correct]), torch.tensor([n]), k)
            assert float(found) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_values_worked_by_hand() -> None:
    """n = 4, c = 1, k = 2: three of six pairs lack the one. C(7, 5) = 21 and C(10, 5) = 252."""
    correct, samples = torch.tensor([1, 0, 4]), torch.tensor([4, 4, 4])
    assert pass_at_k(correct, samples, 2).tolist() == [0.5, 0.0, 1.0]
    assert float(pass_at_k(torch.tensor([3]), torch.tensor([10]), 5)) == pytest.approx(1 - 21 / 252, abs=1e-12)


def test_many_samples_stay_exact() -> None:
    """1 - C(190, 100) / C(200, 100) with ten correct of 200, from exact integers."""
    found = float(pass_at_k(torch.tensor([10]), torch.tensor([200]), 100))
    assert found == pytest.approx(0.9992289739, abs=1e-10)


def test_prompts_may_have_different_numbers_of_samples() -> None:
    found = pass_at_k(torch.tensor([1, 1]), torch.tensor([2, 4]), 1)
    assert found.tolist() == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize(("correct", "samples", "k"), [(1, 2, 3), (3, 2, 1), (-1, 2, 1), (1, 2, 0)])
def test_counts_that_cannot_be_are_refused(correct: int, samples: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= c <= n"):
        pass_at_k(torch.tensor([correct]), torch.tensor([samples]), k)
