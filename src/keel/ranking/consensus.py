"""A Bradley-Terry model of all rankings: a score for each response, and a weight for each rater.

Shapes: N pairwise votes, I items of at most K responses, R raters, 5 quadrature points.
"""

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
"""Prior variance of the raters' weights around their mean. About a dozen comparisons outweigh it."""
MAX_ROUNDS, TOLERANCE = 500, 1e-3
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
"""Gauss-Hermite quadrature of an expectation over N(0, 1). The weights sum to sqrt(2 pi)."""


@dataclass(frozen=True)
class Consensus:
    """P(i preferred to j | rater) = sigma(weights[rater] * (scores[item][i] - scores[item][j]))"""

    weights: dict[str, float]  # of each rater who ranked anything; their mean is 1, and 0 is noise
    scores: dict[int, tuple[float | None, ...]]  # item number -> score per response; None if nobody ranked it

    def ranks(self, item: Item) -> tuple[int | None, ...]:
        """Return the rank of each response: 1 is best, equal scores tie, None = not ranked."""
        scores = [None if score is None else round(score, 6) for score in self.scores[item.number]]
        levels = sorted({score for score in scores if score is not None}, reverse=True)
        return tuple(None if score is None else levels.index(score) + 1 for score in scores)


@dataclass(frozen=True)
class Votes:
    """Each pair of responses that one rater ranked, as one vote."""

    items: list[Item]  # I
    raters: list[str]  # R
    item: Array  # [N], index into items
    pair: Array  # [N, 2], indices of the two responses
    rater: Array  # [N], index into raters
    won: Array  # [N], 1 = the first response is better, 0 = the second, 0.5 = a tie
    share: Array  # [N], weight of the vote
    ranked: Array  # [I, K] bool, ranked by at least one rater


def fit_consensus(judgements: Sequence[Judgement]) -> Consensus:
    """Fit the scores of all responses and the weights of all raters jointly.

    The model is Bradley-Terry with a slope w_r >= 0 for each rater r: P(i preferred to j | r) = sigma(w_r (s_i - s_j)).
    It follows Chen, Bennett, Collins-Thompson and Horvitz 2013, "Pairwise ranking aggregation in a crowdsourced
    setting". There, a rater errs with the same probability in each comparison. With a slope, errors are more likely
    where responses are close. A tie is half a win for each.

    A ranking of K responses has K (K - 1) / 2 dependent pairs, so each pair counts as log2(K!) / (K (K - 1) / 2) of a
    vote. A random order then has probability 1 / K! under w = 0. Being consistent with itself, as every ranking is,
    does not raise a rater's weight.

    Priors: s ~ N(0, 1) for each response; w_r ~ N(mu, WEIGHT_VARIANCE), mu ~ N(1, 1). They keep the estimates finite
    if raters are unanimous, and keep a rater with few rankings near the mean.

    The scores are integrated out with a normal approximation for each item (variational EM; Opper and Archambeau
    2009). Point estimates would fit the rater of an item that nobody else ranked, and so overrate that rater. With few
    rankings, the estimated weights differ less than the raters do.
    """
    votes = _votes(judgements)
    if not votes.raters:
        return Consensus({}, {item.number: (None,) * len(item.responses) for item in votes.items})
    weights, means = np.ones(len(votes.raters)), np.zeros(votes.ranked.shape)
    # The prior of s_i - s_j: the difference of two N(0, 1) scores has the variance 2.
    differences = np.sqrt(2) * np.broadcast_to(NODES, (len(votes.item), len(NODES)))
    for _ in range(MAX_ROUNDS):
        means, differences = _update_scores(votes, weights, means, differences)
        previous, weights = weights, _update_weights(votes, weights, differences)
        if np.abs(weights - previous).max() < TOLERANCE * weights.mean():
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
    item_indices = {item.number: index for index, item in enumerate(items)}
    ranked = np.zeros((len(items), max((len(item.responses) for item in items), default=0)), dtype=bool)
    rows: list[tuple[int, int, int, str, float, float]] = []
    for judgement in ordered:
        item_index = item_indices[judgement.item.number]
        ranks = [(k, rank) for k, rank in enumerate(judgement.ranks or ()) if rank is not None]
        ranked[item_index, [k for k, _ in ranks]] = True
        share = _vote_share(len(ranks))
        for (i, one), (j, other) in combinations(ranks, 2):
            rows.append((item_index, i, j, judgement.rater, (1 + (one < other) - (one > other)) / 2, share))
    raters = sorted({row[3] for row in rows})
    rater_indices = {rater: index for index, rater in enumerate(raters)}
    table = np.array([(n, i, j, rater_indices[r], won, share) for n, i, j, r, won, share in rows]).reshape(-1, 6)
    item, first, second, rater = table[:, :4].astype(int).T
    return Votes(
        items=items,
        raters=raters,
        item=item,
        pair=np.stack([first, second], 1),
        rater=rater,
        won=table[:, 4],
        share=table[:, 5],
        ranked=ranked,
    )


def _vote_share(count: int) -> float:
    """Return log2(K!) / (K (K - 1) / 2), the bits in an order of K responses per pair. It is 1 for K = 2."""
    return lgamma(count + 1) / log(2) / (count * (count - 1) / 2) if count > 1 else 0.0


def _update_scores(votes: Votes, weights: Array, means: Array, differences: Array) -> tuple[Array, Array]:
    """Take one Newton step of the mean scores of each item.

    Args:
        votes: The votes.
        weights: [R], slope of each rater.
        means: [I, K], mean scores.
        differences: [N, 5], quadrature points of s_i - s_j of each vote.

    Returns:
        The new means and the new differences.
    """
    count, width = votes.ranked.shape
    item, (first, second) = votes.item, votes.pair.T
    slope = weights[votes.rater]
    probability = _sigma(slope[:, None] * differences)
    gradient = votes.share * slope * (votes.won - _expectation(probability))
    curvature = votes.share * slope**2 * _expectation(probability * (1 - probability))

    def sum_by_cell(rows: Array, columns: Array) -> Array:
        flat = (item * width + rows) * width + columns
        return np.bincount(flat, curvature, count * width * width).reshape(count, width, width)

    precision = np.eye(width) + sum_by_cell(first, first) + sum_by_cell(second, second)  # eye: the prior N(0, 1)
    precision -= sum_by_cell(first, second) + sum_by_cell(second, first)
    wins = np.bincount(item * width + first, gradient, count * width)
    losses = np.bincount(item * width + second, gradient, count * width)
    gradients = (wins - losses).reshape(count, width) - means
    covariance = np.linalg.inv(precision)
    means = means + (covariance @ gradients[:, :, None])[:, :, 0]
    variances = np.diagonal(covariance, axis1=1, axis2=2)
    deviation = np.sqrt(variances[item, first] + variances[item, second] - 2 * covariance[item, first, second])
    return means, (means[item, first] - means[item, second])[:, None] + deviation[:, None] * NODES


def _update_weights(votes: Votes, weights: Array, differences: Array) -> Array:
    """Take one Newton step of the raters' slopes, given the quadrature points of the score differences. [R] -> [R]"""
    count = len(weights)
    probability = _sigma(weights[votes.rater][:, None] * differences)
    gradient = np.bincount(
        votes.rater, votes.share * _expectation((votes.won[:, None] - probability) * differences), count
    )
    curvature = np.bincount(
        votes.rater, votes.share * _expectation(probability * (1 - probability) * differences**2), count
    )
    centre = (weights.sum() / WEIGHT_VARIANCE + 1) / (count / WEIGHT_VARIANCE + 1)  # mu, given the weights
    step = (gradient - (weights - centre) / WEIGHT_VARIANCE) / (curvature + 1 / WEIGHT_VARIANCE)
    return np.maximum(0.0, weights + step)


def _expectation(values: Array) -> Array:
    """Average over the quadrature points. [N, 5] -> [N]"""
    return values @ (NODE_WEIGHTS / NODE_WEIGHTS.sum())


def _sigma(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(x / 2)
