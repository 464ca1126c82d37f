"""Which prompts each step of a run gets."""

import torch

from keel.data.prompts import Prompt
from keel.world import generator


def draw_prompts(prompts: list[Prompt], seed: int, first: int, count: int) -> list[Prompt]:
    """Return `count` prompts of an endless sequence, from position `first` on.

    Every pass over the data is a new shuffle, and no prompt is left out of it.
    """
    drawn: list[Prompt] = []
    for position in range(first, first + count):
        epoch, row = divmod(position, len(prompts))
        if row == 0 or not drawn:
            order = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
        drawn.append(prompts[order[row]])
    return drawn


def prompts_of_step(
    prompts: list[Prompt], seed: int, step: int, batch_size: int, group_size: int, extra: int = 0
) -> list[Prompt]:
    """Return the prompts of a step, each `group_size` times.

    Args:
        extra: number of prompts that earlier steps drew in addition to those of their batches.
    """
    count = batch_size // group_size
    drawn = draw_prompts(prompts, seed, (step - 1) * count + extra, count)
    return [prompt for prompt in drawn for _ in range(group_size)]
