"""Batches over several processes: gathered after sampling, and dealt for the update by tokens."""

from collections.abc import Sequence
from dataclasses import fields, replace

from torch import Tensor
from torch.nn.functional import pad

from keel.data.batches import TrainingBatch
from keel.world import World


def gather_batch(batch: TrainingBatch, world: World) -> TrainingBatch:
    """Return the rows of all processes, in rank order. Widths grow to the largest of all processes."""
    if world.size == 1:
        return batch
    return replace(
        batch,
        **{
            field.name: gather_rows(getattr(batch, field.name), world, field.name.startswith("prompt_"))
            for field in fields(batch)
        },
    )


def gather_rows(tensor: Tensor, world: World, pad_left: bool = False) -> Tensor:
    """Return the rows of all processes, in rank order, padded with zeros. [B, T] -> [all rows, widest T]"""
    missing = world.max(tensor.shape[1]) - tensor.shape[1]
    return world.gather(pad(tensor, (missing, 0) if pad_left else (0, missing)))


def deal_rows(rows: Sequence[int], tokens: Sequence[int], processes: int) -> list[list[int]]:
    """Deal rows to processes so that each has about as many tokens.

    Rows are dealt from the longest on, each to the process with the fewest tokens so far (Graham 1969). The rows of a
    process keep their order.

    Args:
        tokens: of each row, by its number.
    """
    loads, owner = [0] * processes, dict[int, int]()
    for row in sorted(rows, key=lambda row: -tokens[row]):
        owner[row] = min(range(processes), key=loads.__getitem__)
        loads[owner[row]] += tokens[row]
    return [[row for row in rows if owner[row] == process] for process in range(processes)]
