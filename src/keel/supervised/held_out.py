"""Measure rows without gradients, each process a share of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from keel.learn.gather import deal_rows
from keel.models.sharding import gathered_weights
from keel.world import World


def measure_rows(
    model: Any, tokens: Sequence[int], measure: Callable[[list[int]], list[Any]], world: World
) -> list[Any]:
    """Return the results of all rows, in the order of the rows. Every process must call it.

    Args:
        tokens: of each row. A process gets about as many as any other.
        measure: returns a result, which JSON can hold, for each row of a list, which may be empty.
    """
    shares = measure_shares(model, tokens, lambda rows: [rows, measure(rows)], world)
    by_row = {row: result for rows, results in shares for row, result in zip(rows, results, strict=True)}
    return [by_row[row] for row in range(len(tokens))]


@torch.no_grad()
def measure_shares(model: Any, tokens: Sequence[int], measure: Callable[[list[int]], Any], world: World) -> list[Any]:
    """Return the result of `measure` for the rows of each process, in rank order. Every process must call it.

    The model has all its weights on each process, so that processes make different numbers of passes and none waits
    for another before the end.
    """
    rows = deal_rows(range(len(tokens)), tokens, world.size)[world.rank]
    with gathered_weights(model):
        result = measure(rows)
    return world.gather_values(result)
