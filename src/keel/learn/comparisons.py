"""Losses of rankings, from one value per response: a reward model's score or DPO's implicit reward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from keel.core.preferences import plackett_luce_loss
from keel.data.preferences import Ranking

PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Values of the better and of the worse responses, and the margins of the pairs. [M], [M], [M] -> [M]"""


@dataclass(frozen=True)
class Comparisons:
    """N rankings of at most K responses, with a value for each response."""

    values: Tensor  # [N, K]
    ranks: Tensor  # [N, K], 1 is best, equal ranks tie
    mask: Tensor  # [N, K] bool, True = a response
    margins: Tensor  # [N]

    @classmethod
    def from_rankings(cls, values: Tensor, rankings: Sequence[Ranking]) -> Self:
        """Pad rankings to one width.

        Args:
            values: [M], those of all responses, in the order of the rankings. Every response must have a rank.
        """
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
        """Mean value of the responses of each ranking. [N]"""
        return self.values.sum(1) / self.mask.sum(1)


def pairwise_losses(comparisons: Comparisons, loss: PairLoss, ties: str = "ignore") -> Tensor:
    """Compute the mean loss over the pairs of each ranking. -> [N]

    Args:
        ties: "ignore" leaves out tied pairs. "half" counts each as half a pair in either direction, as if a rater who
            was asked repeatedly preferred each side equally often. (Davidson 1970 models ties separately; half a win
            keeps the Bradley-Terry scores in nats.)
    """
    ranks, mask = comparisons.ranks, comparisons.mask
    ahead = ranks.unsqueeze(1) - ranks.unsqueeze(2)  # [N, i, j]: above 0 where i ranks before j
    shares = (ahead > 0).to(comparisons.values.dtype)
    if ties == "half":
        others = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        shares += 0.5 * ((ahead == 0) & others)
    shares *= mask.unsqueeze(2) & mask.unsqueeze(1)
    n, i, j = shares.nonzero(as_tuple=True)
    losses = loss(comparisons.values[n, i], comparisons.values[n, j], comparisons.margins[n]) * shares[n, i, j]
    return torch.zeros_like(comparisons.margins).index_add(0, n, losses) / shares.sum((1, 2))


def listwise_losses(comparisons: Comparisons) -> Tensor:
    """Compute the Plackett-Luce loss of each ranking, divided by the number of responses not ranked last. -> [N]"""
    ranks, mask = comparisons.ranks, comparisons.mask
    last = mask & (ranks == ranks.max(1, keepdim=True).values)
    return plackett_luce_loss(comparisons.values, ranks, mask) / (mask & ~last).sum(1)
