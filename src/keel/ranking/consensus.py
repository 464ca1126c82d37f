"""What several raters mean together: a score for each answer, and how far each rater can be relied on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import lgamma, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel.ranking.judgements import Item, Judgement

Array = NDArray[Any]

WEIGHT_VARIANCE = 0.1
"""Of the raters' weights around their mean, before anything is seen: what a dozen comparisons can move."""
ROUNDS, TOLERANCE = 500, 1e-3
POINTS, SHARES = np.polynomial.hermite_e.hermegauss(5)
"""Where an expectation over a normal variable is taken, and what each point counts (times sqrt(2 pi))."""


@dataclass(frozen=True)
class Consensus:
    """P(i over j | rater) = sigma(weights[rater] * (scores[item][i] - scores[item][j]))"""

    weights: dict[str, float]  # of each rater who ordered anything: 0 is noise, their mean is 1
    scores: dict[int, tuple[float | None, ...]]  # item number -> of each answer; None where nobody ranked it

    def ranks(self, item: Item) -> tuple[int | None, ...]:
        """Of the item's answers: 1 is best, what comes out equal ties, None = not ranked."""
        scores = [None if score is None else round(score, 6) for score in self.scores[item.number]]
        levels = sorted({score for score in scores if score is not None}, reverse=True)
        return tuple(None if score is None else levels.index(score) + 1 for score in scores)


@dataclass(frozen=True)
class Votes:
    """Every two answers that a rater ranked, as one vote. N votes; I items of at most K answers, R raters."""

    items: list[Item]  # I
    raters: list[str]  # R
    item: Array  # [N], index into items
    pair: Array  # [N, 2], which answers of the item
    rater: Array  # [N], index into raters
    won: Array  # [N], 1 = the first answer is better, 0 = the second, 0.5 = a tie
    share: Array  # [N], how much of a vote it is
    ranked: Array  # [I, K] bool, by anybody


def fit_consensus(judgements: Sequence[Judgement]) -> Consensus:
    """The scores of all answers and the weights of all raters, together.

    The model is Bradley and Terry's with a slope w_r >= 0 for each rater r: P(i over j | r) = sigma(w_r (s_i - s_j)),
    after Chen, Bennett, Collins-Thompson and Horvitz 2013, "Pairwise ranking aggregation in a crowdsourced setting".
    (Their rater errs with one chance in every comparison; a slope lets a person err more where answers are close.) A
    tie is half a win for each. A ranking of K answers has K (K - 1) / 2 pairs that follow from each other, so each
    counts as log2(K!) / (K (K - 1) / 2) of a vote: then an order drawn blindly has its chance, 1 / K!, under w = 0,
    and being consistent with oneself, as every ranking is, speaks for nobody.

    Priors: s ~ N(0, 1) for each answer; w_r ~ N(mu, 0.25), mu ~ N(1, 1). They keep everything finite when raters are
    unanimous, and leave a rater of few words near the mean. The scores are integrated out, as far as a normal
    distribution for each item can (variational EM; Opper and Archambeau 2009): fitted as bare numbers, they would
    follow each rater who is heard alone and trust that rater for it. Of few rankings the weights come out closer
    together than the raters are.
    """
    votes = _votes(judgements)
    if not votes.raters:
        return Consensus({}, {item.number: (None,) * len(item.responses) for item in votes.items})
    weights, means = np.ones(len(votes.raters)), np.zeros(votes.ranked.shape)
    seen = np.sqrt(2) * np.broadcast_to(POINTS, (len(votes.item), len(POINTS)))  # two scores of N(0, 1) apart
    for _ in range(ROUNDS):
        means, seen = _scores(votes, weights, means, seen)
        before, weights = weights, _weights(votes, weights, seen)
        if np.abs(weights - before).max() < TOLERANCE * weights.mean():
            break
    scale = float(weights.mean())
    scores = {
        item.number: tuple(
            float(means[i, k] * scale) if votes.ranked[i, k] else None for k in range(len(item.responses))
        )
        for i, item in enumerate(votes.items)
    }
    return Consensus(dict(zip(votes.raters, (weights / scale).tolist(), strict=True)), scores)


def _votes(judgements: Sequence[Judgement]) -> Votes:
    ordered = sorted(judgements, key=lambda judgement: (judgement.item.number, judgement.rater))
    items = list({judgement.item.number: judgement.item for judgement in ordered}.values())
    places = {item.number: place for place, item in enumerate(items)}
    ranked = np.zeros((len(items), max((len(item.responses) for item in items), default=0)), dtype=bool)
    rows: list[tuple[int, int, int, str, float, float]] = []
    for judgement in ordered:
        place = places[judgement.item.number]
        marks = [(k, rank) for k, rank in enumerate(judgement.ranks or ()) if rank is not None]
        ranked[place, [k for k, _ in marks]] = True
        share = _share(len(marks))
        for (i, one), (j, other) in combinations(marks, 2):
            rows.append((place, i, j, judgement.rater, (1 + (one < other) - (one > other)) / 2, share))
    raters = sorted({row[3] for row in rows})
    numbers = {rater: number for number, rater in enumerate(raters)}
    table = np.array([(p, i, j, numbers[r], won, share) for p, i, j, r, won, share in rows]).reshape(-1, 6)
    place, first, second, rater = table[:, :4].astype(int).T
    return Votes(items, raters, place, np.stack([first, second], 1), rater, table[:, 4], table[:, 5], ranked)


def _share(count: int) -> float:
    """log2(K!) / (K (K - 1) / 2): bits in an order of K answers, for each of its pairs. 1 for a pair."""
    return lgamma(count + 1) / log(2) / (count * (count - 1) / 2) if count > 1 else 0.0


def _scores(votes: Votes, weights: Array, means: Array, seen: Array) -> tuple[Array, Array]:
    """A Newton step of each item's scores [I, K], and the points [N, 5] that stand for s_i - s_j of each vote."""
    count, width = votes.ranked.shape
    at, (first, second) = votes.item, votes.pair.T
    slope = weights[votes.rater]
    chance = _sigma(slope[:, None] * seen)
    pull = votes.share * slope * (votes.won - _mean(chance))
    size = votes.share * slope**2 * _mean(chance * (1 - chance))

    def cells(rows: Array, columns: Array) -> Array:
        flat = (at * width + rows) * width + columns
        return np.bincount(flat, size, count * width * width).reshape(count, width, width)

    precision = np.eye(width) + cells(first, first) + cells(second, second)
    precision -= cells(first, second) + cells(second, first)
    wins = np.bincount(at * width + first, pull, count * width)
    losses = np.bincount(at * width + second, pull, count * width)
    slopes = (wins - losses).reshape(count, width) - means
    spread = np.linalg.inv(precision)
    means = means + (spread @ slopes[:, :, None])[:, :, 0]
    own = np.diagonal(spread, axis1=1, axis2=2)
    deviation = np.sqrt(own[at, first] + own[at, second] - 2 * spread[at, first, second])
    return means, (means[at, first] - means[at, second])[:, None] + deviation[:, None] * POINTS


def _weights(votes: Votes, weights: Array, seen: Array) -> Array:
    """A Newton step of each rater's slope, given what the scores are thought to be. [R] -> [R]"""
    count = len(weights)
    chance = _sigma(weights[votes.rater][:, None] * seen)
    slope = np.bincount(votes.rater, votes.share * _mean((votes.won[:, None] - chance) * seen), count)
    size = np.bincount(votes.rater, votes.share * _mean(chance * (1 - chance) * seen**2), count)
    centre = (weights.sum() / WEIGHT_VARIANCE + 1) / (count / WEIGHT_VARIANCE + 1)
    step = (slope - (weights - centre) / WEIGHT_VARIANCE) / (size + 1 / WEIGHT_VARIANCE)
    return np.maximum(0.0, weights + step)


def _mean(values: Array) -> Array:
    """Over the points of a normal variable. [N, 5] -> [N]"""
    return values @ (SHARES / SHARES.sum())


def _sigma(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(x / 2)
