"""Losses of whole rankings from one number for each answer: a reward model's score, or DPO's implicit reward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from keel.core.preferences import tied_plackett_luce_loss
from keel.data.preferences import Ranking

PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Values of the better and of the worse answers, and the pairs' margins. [M], [M], [M] -> [M]"""


@dataclass(frozen=True)
class Comparisons:
    """N rankings of at most K answers, and a value for each answer."""

    values: Tensor  # [N, K]
    ranks: Tensor  # [N, K] 1 is best, equal ranks tie
    mask: Tensor  # [N, K] bool, True = an answer
    margins: Tensor  # [N]

    @classmethod
    def from_rankings(cls, values: Tensor, rankings: Sequence[Ranking]) -> Self:
        """From the values of all answers, ranking after ranking [M]; every answer must be ranked."""
        counts = torch.tensor([len(ranking.ranks) for ranking in rankings], device=values.device)
        mask = torch.arange(int(counts.max()), device=values.device) < counts.unsqueeze(1)
        ranks = torch.tensor([rank for ranking in rankings for rank in ranking.ranks], device=values.device)
        return cls(
            values.new_zeros(mask.shape).masked_scatter(mask, values),
            ranks.new_zeros(mask.shape).masked_scatter(mask, ranks),
            mask,
            values.new_tensor([ranking.margin for ranking in rankings]),
        )

    @property
    def means(self) -> Tensor:
        """Mean value of each ranking's answers. -> [N]"""
        return self.values.sum(1) / self.mask.sum(1)


def pairwise_losses(comparisons: Comparisons, loss: PairLoss, ties: str = "ignore") -> Tensor:
    """Mean loss over the pairs of each ranking that were told apart. -> [N]

    With `ties` "half", a tied pair counts as well, half in either direction: as a person who is asked often and says
    each as often (Davidson 1970 models ties apart; half a win keeps the Bradley-Terry scores in nats).
    """
    ranks, mask = comparisons.ranks, comparisons.mask
    ahead = ranks.unsqueeze(1) - ranks.unsqueeze(2)  # [N, i, j]: above 0 where i is before j
    shares = (ahead > 0).to(comparisons.values.dtype)
    if ties == "half":
        others = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        shares += 0.5 * ((ahead == 0) & others)
    shares *= mask.unsqueeze(2) & mask.unsqueeze(1)
    n, i, j = shares.nonzero(as_tuple=True)
    losses = loss(comparisons.values[n, i], comparisons.values[n, j], comparisons.margins[n]) * shares[n, i, j]
    return torch.zeros_like(comparisons.margins).index_add(0, n, losses) / shares.sum((1, 2))


def listwise_losses(comparisons: Comparisons) -> Tensor:
    """Plackett-Luce loss of each ranking, per answer that was put before others. -> [N]"""
    ranks, mask = comparisons.ranks, comparisons.mask
    last = mask & (ranks == ranks.max(1, keepdim=True).values)
    return tied_plackett_luce_loss(comparisons.values, ranks, mask) / (mask & ~last).sum(1)
