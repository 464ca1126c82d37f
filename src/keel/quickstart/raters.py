"""Simulated raters: they see the gold score with noise, tie replies of similar scores, and skip some replies."""

import math
import random

from keel.data.turn_text import content_text
from keel.quickstart.gold import gold_score
from keel.ranking.store import Store

TIE_WIDTH = 0.5  # replies whose noisy scores are this close to the best of their group share its rank
SKIP_CHANCE = 0.05


def simulated_ranks(prompt: str, replies: list[str], rng: random.Random, noise: float) -> list[int | None]:
    """Return the ranks of one rater: 1 is best, equal ranks tie, None is not ranked. At least two replies are ranked.

    Gumbel noise of scale `noise` makes the order a draw from a Plackett-Luce model with scores gold / noise
    (Yellott 1977), which is what a reward model assumes of raters. Equal texts get equal scores.
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
    """Let a simulated rater rank every item of the store, dealt as to a person.

    Random numbers are drawn in the order of the items and responses in the store, not in the order of display, so the
    ranks do not depend on how the store shuffles.
    """
    with store.together():
        while deal := store.deal(rater):
            ranks = simulated_ranks(content_text(deal.item.prompt), list(deal.item.responses), rng, noise)
            store.record_judgement(rater, deal.id, [ranks[place] for place in deal.shown])


def _gumbel(rng: random.Random) -> float:
    # The bounds exclude 0 and 1, for which the logarithms are infinite.
    return -math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12)))
