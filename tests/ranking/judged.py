"""Judgements for the tests, and simulated raters who share nothing with the code under test."""

import math
import random
from collections.abc import Mapping, Sequence

from keel.ranking.judgements import Item, Judgement


def item(number: int, *responses: str, prompt: str = "") -> Item:
    return Item(number, prompt or f"prompt {number}", responses or ("a", "bb", "ccc"))


def judged(of: Item, rater: str, ranks: Sequence[int | None] | None, **others: object) -> Judgement:
    shown = tuple(range(len(of.responses)))
    given = {"shown": shown, "seconds": 10.0} | others
    return Judgement(of, rater, None if ranks is None else tuple(ranks), **given)  # type: ignore[arg-type]


def simulated(
    slopes: Mapping[str, float], items: int, answers: int, overlap: int, seed: int
) -> tuple[list[Item], list[Judgement]]:
    """Each rater orders slope * quality + Gumbel noise, so that P(i over j) = sigma(slope * (q_i - q_j)); slope 0 is
    noise, a negative one is contrary. Qualities are of N(0, 1)."""
    draw, shown, found = random.Random(seed), [], []
    for number in range(1, items + 1):
        one = item(number, *(f"answer {k}" for k in range(answers)))
        qualities = [draw.gauss(0, 1) for _ in range(answers)]
        for rater in draw.sample(sorted(slopes), overlap):
            seen = [slopes[rater] * quality - math.log(-math.log(draw.random())) for quality in qualities]
            order = sorted(range(answers), key=lambda k: -seen[k])
            found.append(judged(one, rater, [order.index(k) + 1 for k in range(answers)]))
        shown.append(one)
    return shown, found
