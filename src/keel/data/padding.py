"""Rows of unequal length become rectangles, with as little padding as can be."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids as tokens [N, L] and mask [N, L] bool (True = real), padded on the `right` or the `left`."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, place] = torch.tensor(row, dtype=tokens.dtype)
        mask[i, place] = True
    return tokens, mask


def microbatches(
    lengths: Sequence[int], microbatch_tokens: int, counts: Sequence[int] | None = None
) -> list[list[int]]:
    """Groups of indices with at most `microbatch_tokens` padded tokens each, and at least one index.

    Index i stands for `counts[i]` rows (default 1) of up to `lengths[i]` tokens that stay together. The longest come
    first: a group is as wide as its first member, and memory that does not suffice shows at once.
    """
    groups: list[list[int]] = []
    width = rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        count = 1 if counts is None else counts[i]
        if groups and (rows + count) * width <= microbatch_tokens:
            groups[-1].append(i)
            rows += count
        else:
            groups.append([i])
            width, rows = lengths[i], count
    return groups
