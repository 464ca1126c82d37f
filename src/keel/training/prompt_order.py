"""The order in which a run draws its prompts. It depends on the seed and on the position alone."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch

from keel.data.prompts import Prompt
from keel.world import generator


@dataclass(frozen=True)
class Mixture:
    """Several files of prompts and their shares of the draws."""

    sizes: tuple[int, ...]  # prompts of each file
    weights: tuple[float, ...]  # relative to each other

    def turns(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return the file of each draw from position `first` on, and how many draws this file had before.

        The files take turns, spread as evenly as their weights allow: the j-th draw of a file with share w (from 0 on)
        is due at time (j + 1/2) / w (the method of Webster). After n draws, a file has had n w of them, give or take
        the number of files / 2.
        """
        weights = [Fraction(weight) for weight in self.weights]
        shares, half = [weight / sum(weights) for weight in weights], Fraction(1, 2)
        begin, end = max(0, first - len(shares)), first + count + len(shares)
        skipped = [max(0, ceil(begin * share - half)) for share in shares]  # draws that are due before `begin`
        due = sorted(
            ((draw + half) / share, file, draw)
            for file, share in enumerate(shares)
            for draw in range(skipped[file], max(0, ceil(end * share - half)))
        )
        return [(file, draw) for _, file, draw in due[first - sum(skipped) :][:count]]


def draw_prompts(
    prompts: list[Prompt], seed: int, first: int, count: int, mixture: Mixture | None = None
) -> list[Prompt]:
    """Return `count` prompts of an endless sequence, from position `first` on.

    Every pass over the data, or over a file of a mixture, is a new shuffle, and no prompt is left out of it.

    Args:
        prompts: of all files, one file after the other.
    """
    if mixture is None:
        return [prompts[row] for row in _rows(len(prompts), first, count, seed)]
    turns = mixture.turns(first, count)
    drawn: dict[tuple[int, int], Prompt] = {}
    for file, size in enumerate(mixture.sizes):
        draws = [draw for number, draw in turns if number == file]
        start = sum(mixture.sizes[:file])
        rows = _rows(size, draws[0], len(draws), seed, file) if draws else []
        drawn |= {(file, draw): prompts[start + row] for draw, row in zip(draws, rows, strict=True)}
    return [drawn[turn] for turn in turns]


def _rows(size: int, first: int, count: int, seed: int, *stream: int) -> list[int]:
    """Return the rows of a file at these positions of its endless sequence."""
    rows: list[int] = []
    for position in range(first, first + count):
        epoch, place = divmod(position, size)
        if place == 0 or not rows:
            order = torch.randperm(size, generator=generator(seed, "prompts", *stream, epoch)).tolist()
        rows.append(order[place])
    return rows
