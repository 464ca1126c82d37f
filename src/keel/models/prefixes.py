"""Tokens that several rows have in common at their start. A causal model needs to read each of them only once.

Responses to one prompt, the responses of a pair or ranking, and chats with the same system message share a prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORTHWHILE = 0.85
"""Largest share of distinct tokens at which copying queries, keys and values takes less time than it saves."""


@dataclass(frozen=True)
class SharedPrefixes:
    """The D distinct tokens of N packed tokens: tokens at the same place after the same tokens are not distinct."""

    copies: Tensor  # [N], which of the distinct tokens each packed token is
    firsts: Tensor  # [D], the first packed token of each distinct one
    others: Tensor  # [N - D], all other packed tokens

    def select(self, x: Tensor) -> Tensor:
        """Keep the distinct tokens. [N, ...] -> [D, ...]"""
        return x.index_select(0, self.firsts)

    def expand(self, x: Tensor) -> Tensor:
        """Copy distinct tokens to all packed tokens that they stand for. [D, ...] -> [N, ...]"""
        expanded: Tensor = _Expand.apply(x, self)
        return expanded


def find_shared_prefixes(tokens: Tensor, mask: Tensor, lengths: Sequence[int]) -> SharedPrefixes | None:
    """Find what rows share at their start, or return None if reading it once would not save enough.

    Args:
        tokens: [B, L], with padding at the end of a row.
        mask: [B, L] bool. Packed tokens are `tokens[mask]`.
        lengths: of the B rows.
    """
    rows, device = len(tokens), tokens.device
    short = int((1 - WORTHWHILE) * sum(lengths) / rows)
    if len(set(map(tuple, tokens[:, :short].tolist()))) == rows:
        return None  # no row shares as much as the mean row would have to
    texts = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    order = torch.tensor(sorted(range(rows), key=texts.__getitem__), device=device)
    # Of rows in alphabetical order, each shares most with the one before it.
    ordered, counted = tokens[order], mask[order]
    same = (ordered[1:] == ordered[:-1]) & counted[1:] & counted[:-1]
    shared = torch.cat([mask.new_zeros(1, mask.shape[1]), same.long().cumprod(1).bool()])
    if (counted & ~shared).sum() > WORTHWHILE * counted.sum():
        return None
    place = torch.arange(rows, device=device).unsqueeze(1)
    owner = order[place.masked_fill(shared, 0).cummax(0).values][order.argsort()]  # the row that reads each token
    is_distinct = mask & (owner == place)
    number = (is_distinct.flatten().cumsum(0) - 1).view(mask.shape)
    in_packed = is_distinct[mask]
    return SharedPrefixes(number.gather(0, owner)[mask], *(x.nonzero().squeeze(1) for x in (in_packed, ~in_packed)))


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedPrefixes) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        total, copies = (gradients[0].index_select(0, index) for index in (shared.firsts, shared.others))
        places = shared.copies.index_select(0, shared.others)
        if total.is_cuda:  # index_add_ would sum in any order there, so that no run repeats another
            return total.index_put_((places,), copies, accumulate=True), None
        return total.index_add_(0, places, copies), None
