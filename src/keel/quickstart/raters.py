"""Simulated people who rank replies: each sees the gold score through noise, ties what seems alike, skips some."""

import math
import random

from keel.data.turn_text import content_text
from keel.quickstart.gold import gold_score
from keel.ranking.store import Store

TIE_WIDTH = 0.5  # replies that seem this close to the best of their group share its rank
SKIP_CHANCE = 0.05


def simulated_ranks(prompt: str, replies: list[str], rng: random.Random, noise: float) -> list[int | None]:
    """One rater's ranks, 1 for the best; equal ranks tie, None is not ranked (two replies or more always are).

    Gumbel noise of scale `noise` makes the order a draw from Plackett-Luce with scores gold / noise
    (Yellott 1977), the model that a reward model assumes of people. Equal replies seem equal.
    """
    seen = {reply: gold_score(prompt, reply) + noise * _gumbel(rng) for reply in dict.fromkeys(replies)}
    kept = [index for index in range(len(replies)) if rng.random() >= SKIP_CHANCE]
    if len(kept) < 2:
        kept = list(range(len(replies)))
    ranks: list[int | None] = [None] * len(replies)
    rank, group_best = 0, math.inf
    for index in sorted(kept, key=lambda i: -seen[replies[i]]):
        if seen[replies[index]] < group_best - TIE_WIDTH:
            rank, group_best = rank + 1, seen[replies[index]]
        ranks[index] = rank
    return ranks


def rank_everything(store: Store, rater: str, rng: random.Random, noise: float = 1.0) -> None:
    """A simulated rater is dealt items as a person is, until none is left, and ranks each.

    `rng` is drawn from item by item and answer by answer in the store's order, whatever order was shown.
    """
    with store.together():
        while deal := store.deal(rater):
            ranks = simulated_ranks(content_text(deal.item.prompt), list(deal.item.responses), rng, noise)
            store.record_judgement(rater, deal.id, [ranks[place] for place in deal.shown])


def _gumbel(rng: random.Random) -> float:
    return -math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12)))
