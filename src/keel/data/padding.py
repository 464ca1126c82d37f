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


def microbatches(lengths: Sequence[int], microbatch_tokens: int) -> list[list[int]]:
    """Groups of rows, each of at most `microbatch_tokens` padded tokens or of a single row.

    The longest come first: a group is as wide as its first row, and memory that does not suffice shows at once.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= microbatch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def next_multiple(count: int, step: int) -> int:
    return -(-count // step) * step
