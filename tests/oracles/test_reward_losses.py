"""The losses on comparisons as `keel reward` uses them: rankings in, one loss a ranking, centred."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from keel.data.preferences import Ranking
from keel.supervised.ranking_task import EncodedRanking, ranking_losses

from ..core.expect import close, gradient

pytestmark = pytest.mark.usefixtures("float64")


def losses(
    scores: Tensor, rankings: list[list[int]], loss: str, center_coef: float = 0.0, margin: float = 0.0
) -> Tensor:
    """Losses of rankings whose answers have these scores, one after another, by a model that only says them."""
    model = SimpleNamespace(scores_of_rows=lambda rows, microbatch_tokens: scores)
    rows = [Ranking("", ("",) * len(ranks), tuple(ranks), margin) for ranks in rankings]
    encoded = [EncodedRanking([[0]] * len(row.ranks), row) for row in rows]
    settings = SimpleNamespace(loss=loss, center_coef=center_coef, microbatch_tokens=100, ties="ignore")
    return ranking_losses(model, encoded, settings)


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_centring(loss: str) -> None:
    scores = torch.tensor([3.0, 1.0], requires_grad=True)
    value = losses(scores, [[1, 2]], loss, center_coef=0.01)
    close(value, [0.2869280110])
    close(gradient(value, scores)[0], [-0.0392029229, 0.1992029220])


def test_margin() -> None:
    close(losses(torch.tensor([1.0, 0.0]), [[1, 2]], "pairwise", margin=2.0), [1.3132616875])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_the_order_in_which_answers_come_does_not_matter(order: list[int]) -> None:
    scores, ranks = [2.0, 1.0, 0.0], [1, 2, 3]
    shuffled = torch.tensor([scores[i] for i in order])
    close(losses(shuffled, [[ranks[i] for i in order]], "pairwise"), [0.2511504620])
    close(losses(shuffled, [[ranks[i] for i in order]], "listwise"), [0.7208676520 / 2])  # per answer put before others


def test_the_best_of_four_is_a_softmax() -> None:
    """What follows the best is not ranked, so it ties."""
    close(losses(torch.tensor([1.0, 2.0, 3.0, 4.0]), [[2, 2, 2, 1]], "listwise"), [0.4401896986])


def test_rankings_of_unequal_length_do_not_mix() -> None:
    scores = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.0, 1.0])
    close(losses(scores, [[1, 2], [1, 2, 3], [1, 2]], "pairwise"), [0.3132616875, 0.2511504620, 1.3132616875])


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_known_preferences_are_recovered_and_centred(loss: str) -> None:
    """75 of 100 raters prefer the first of two answers: the margin becomes ln 3, and the scores' sum stays at 0."""
    scores = torch.tensor([2.0, 1.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], line_search_fn="strong_wolfe", max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = losses(scores.repeat(100), [[1, 2]] * 75 + [[2, 1]] * 25, loss, center_coef=0.01).mean()
        value.backward()
        return value

    optimizer.step(closure)
    close(scores, [0.5493061, -0.5493061], atol=1e-4)
    close(closure(), 0.5623351, atol=1e-6)
