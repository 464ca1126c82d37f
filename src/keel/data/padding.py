"""Pad rows of unequal length, and group rows into micro-batches with little padding."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Return tokens [N, L] and mask [N, L] bool (True = real token). `side` is where the padding is: right or left."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, columns] = torch.tensor(row, dtype=tokens.dtype)
        mask[i, columns] = True
    return tokens, mask


def microbatches(lengths: Sequence[int], microbatch_tokens: int) -> list[list[int]]:
    """Group row indices so that each group has at most `microbatch_tokens` padded tokens, or is a single row.

    The longest rows come first. A group is then as wide as its first row, and a lack of memory shows in the first pass.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= microbatch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def next_multiple(count: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `count`."""
    return -(-count // step) * step
