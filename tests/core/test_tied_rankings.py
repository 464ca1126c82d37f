"""Rankings with ties: the exact sum over the orders that agree with them, found here by writing those orders out."""

from itertools import pairwise, permutations
from math import comb, log

import pytest
import torch
from torch import Tensor

from keel.core.preferences import bradley_terry_loss, plackett_luce_loss

pytestmark = pytest.mark.usefixtures("float64")


def everyone(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape, dtype=torch.bool)


def order_loss(ordered: Tensor) -> Tensor:
    """-log P(order) = sum_k [logsumexp(s_k..s_K) - s_k] of scores in ranked order, Plackett 1975. [N, K] -> [N]"""
    return (ordered.flip(1).logcumsumexp(1).flip(1) - ordered).sum(1)


def summed_over_orders(scores: Tensor, ranks: list[int]) -> Tensor:
    orders = [
        list(order)
        for order in permutations(range(len(ranks)))
        if all(ranks[a] <= ranks[b] for a, b in pairwise(order))
    ]
    return -torch.logsumexp(-order_loss(scores[torch.tensor(orders)]), 0)


@pytest.mark.parametrize(
    "ranks", [[1, 1], [1, 2], [2, 1, 1], [1, 1, 2], [1, 2, 2, 3], [3, 1, 1, 1, 2], [2, 2, 1, 1, 3]]
)
def test_a_tie_adds_up_the_orders_it_leaves_open(ranks: list[int]):
    scores = (torch.randn(len(ranks), generator=torch.Generator().manual_seed(1)) * 3).requires_grad_()
    loss = plackett_luce_loss(scores.unsqueeze(0), torch.tensor([ranks]), everyone(scores.unsqueeze(0)))[0]
    expected = summed_over_orders(scores, ranks)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-11)
    got, wanted = (torch.autograd.grad(value, scores)[0] for value in (loss, expected))
    assert torch.allclose(got, wanted, atol=1e-10)


def test_without_ties_it_is_plackett_luce_and_masked_entries_have_no_part():
    scores = torch.tensor([[2.0, 1.0, 0.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss = plackett_luce_loss(scores, torch.tensor([[1, 2, 3, 1]]), mask)
    assert loss.item() == pytest.approx(0.7208676520, abs=1e-10)


def test_the_order_of_the_columns_does_not_matter():
    scores, ranks = torch.tensor([[0.3, -1.0, 2.0, 0.7]]), torch.tensor([[2, 1, 1, 3]])
    order = [2, 0, 3, 1]
    one = plackett_luce_loss(scores, ranks, everyone(scores))
    other = plackett_luce_loss(scores[:, order], ranks[:, order], everyone(scores))
    assert one.item() == pytest.approx(other.item(), abs=1e-12)


def test_long_rankings_in_three_grades():
    scores = torch.zeros(1, 42)
    loss = plackett_luce_loss(scores, (torch.arange(42) // 14).unsqueeze(0), everyone(scores))
    assert loss.item() == pytest.approx(log(comb(42, 14)) + log(comb(28, 14)), abs=1e-10)  # 42.1982178515


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_apart_scores_stay_finite(dtype: torch.dtype):
    scores = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 0.0, 1000.0]], dtype=dtype, requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([[1, 1, 2], [1, 1, 2]]), everyone(scores))
    assert loss.tolist() == pytest.approx([log(2), 2000 - log(2)], rel=1e-6)
    assert torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()


def test_two_answers_give_bradley_terry():
    scores = torch.tensor([[0.3, -0.9], [2.0, 5.0]])
    loss = plackett_luce_loss(scores, torch.tensor([[1, 2], [1, 2]]), everyone(scores))
    assert torch.allclose(loss, bradley_terry_loss(scores[:, 0], scores[:, 1]), atol=1e-12)
