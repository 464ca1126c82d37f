"""How good scores are on held-out rankings, beside what length alone would say. Knows scores and no model."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel.data.preferences import Ranking, prompt_key

Scores = Sequence[Sequence[float]]
"""One score for each response of each ranking."""
Numbers = NDArray[np.float64]
NUM_BINS = 10
RESAMPLES = 2_000


@dataclass(frozen=True)
class Pairs:
    """All pairs of answers that were told apart. Each ranking counts by its weight, shared among its pairs."""

    differences: Numbers  # [M] score of the better minus score of the worse answer
    weights: Numbers  # [M] they sum to 1
    rankings: NDArray[np.int64]  # [M] index of the ranking
    places: NDArray[np.int64]  # [M, 2] indices of the better and the worse response

    @property
    def wins(self) -> Numbers:
        """1 where the scores agree with the person, 1/2 where they are equal. -> [M]"""
        return (self.differences > 0) + 0.5 * (self.differences == 0)

    def where(self, chosen: NDArray[np.bool_]) -> "Pairs":
        """Some of the pairs, whose weights sum to 1 again."""
        weights = self.weights[chosen]
        return Pairs(
            self.differences[chosen], weights / weights.sum(), self.rankings[chosen], self.places[chosen]
        )  # fmt: skip

    def scaled(self, factor: Numbers | float) -> "Pairs":
        return Pairs(self.differences * factor, self.weights, self.rankings, self.places)


def pairs_of(scores: Scores, rankings: Sequence[Ranking]) -> Pairs:
    """Raises nothing: a ranking that prefers nothing adds nothing."""
    rows = [
        (values[better] - values[worse], ranking.weight / len(ranking.pairs), number, better, worse)
        for number, (values, ranking) in enumerate(zip(scores, rankings, strict=True))
        for better, worse in ranking.pairs
    ]
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return Pairs(table[:, 0], table[:, 1] / table[:, 1].sum(), table[:, 2].astype(int), table[:, 3:].astype(int))


def judge(scores: Scores, held_out: Sequence[Ranking]) -> dict[str, float]:
    """Figures over all pairs of answers that were told apart; empty without rankings.

    accuracy: pairs in the right order, equal scores counting half. loss: Bradley-Terry, in nats.
    """
    return figures_of(pairs_of(scores, held_out)) if held_out else {}


def figures_of(pairs: Pairs) -> dict[str, float]:
    return {"accuracy": accuracy(pairs), "loss": loss(pairs), "calibration_error": calibration_error(pairs)}


def baselines(held_out: Sequence[Ranking], train: Sequence[Ranking]) -> dict[str, float]:
    """The same figures for scorers that read nothing; empty without held-out rankings.

    length: the number of characters, or its negative where shorter answers win more often in `train` (length_sign).
    constant: the same score for all answers.
    """
    telling = [ranking for ranking in train if ranking.pairs]
    if not held_out or not telling:
        return {}
    sign = 1.0 if accuracy(pairs_of(lengths(telling), telling)) >= 0.5 else -1.0
    return {
        "length_accuracy": accuracy(pairs_of(lengths(held_out), held_out).scaled(sign)),
        "length_sign": sign,
        "constant_accuracy": 0.5,
        "constant_loss": math.log(2),
    }


def lengths(rankings: Sequence[Ranking]) -> list[list[float]]:
    """Characters of each response."""
    return [[float(len(response)) for response in ranking.responses] for ranking in rankings]


def accuracy(pairs: Pairs) -> float:
    return float(pairs.weights @ pairs.wins)


def loss(pairs: Pairs) -> float:
    """Mean Bradley-Terry loss, log(1 + exp(-difference)), in nats."""
    return float(pairs.weights @ np.logaddexp(0.0, -pairs.differences))


def calibration_error(pairs: Pairs) -> float:
    """Expected calibration error: mean over pairs of |accuracy - confidence| of the pair's bin.

    The scores say that the answer they prefer is the better one with probability sigma(|difference|), between 0.5 and 1
    in NUM_BINS equal bins. Either order of a pair says the same, so one is looked at. Naeini et al. 2015.
    """
    return float(sum(share * abs(right - confidence) for share, right, confidence in reliability(pairs)))


def reliability(pairs: Pairs) -> list[tuple[float, float, float]]:
    """For each bin that holds a pair: its share of all weight, the accuracy in it, and the mean confidence."""
    confidence = np.exp(-np.logaddexp(0.0, -np.abs(pairs.differences)))
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    shares, right, sure = (
        np.bincount(bins, pairs.weights * values, NUM_BINS) for values in (1.0, pairs.wins, confidence)
    )
    filled = np.flatnonzero(shares)
    return [(float(shares[i]), float(right[i] / shares[i]), float(sure[i] / shares[i])) for i in filled]


def temperature(pairs: Pairs) -> float:
    """What to divide the scores by for the least loss (Guo et al. 2017), between 0.01 and 100.

    As if one more ranking, of the usual difference, had been a toss of a coin: a handful of pairs that are all in the
    right order do not make the model sure without end. The loss is convex in 1 / temperature; at the least its slope is
    zero.
    """
    usual = float(pairs.weights @ np.abs(pairs.differences))
    differences = np.append(pairs.differences, [usual, -usual])
    weights = np.append(pairs.weights, [0.5 / len(np.unique(pairs.rankings))] * 2)
    low, high = math.log(0.01), math.log(100.0)
    for _ in range(60):
        middle = (low + high) / 2
        odds = np.exp(-np.logaddexp(0.0, differences * math.exp(middle)))
        slope = -(weights * differences) @ odds
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def calibrated(pairs: Pairs, rankings: Sequence[Ranking]) -> Pairs:
    """The differences of each half of the prompts, divided by the temperature that fits the other half.

    A figure of these is a fair one: no pair was looked at in choosing what divides it.
    """
    halves = np.array([_half(ranking) for ranking in rankings])[pairs.rankings]
    factors = np.ones(len(halves))
    for half in (False, True):
        others = halves != half
        if others.any():
            factors[~others] = 1 / temperature(pairs.where(others))
    return pairs.scaled(factors)


def interval(
    pairs: Pairs, rankings: Sequence[Ranking], figure: Callable[[Pairs], float] = accuracy
) -> tuple[float, float]:
    """95% interval of a figure: percentiles over samples of the prompts, drawn with replacement (Efron 1979)."""
    keys = [prompt_key(ranking.prompt) for ranking in rankings]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    prompts = np.array([numbers[key] for key in keys])[pairs.rankings]
    numbers_present = np.unique(prompts, return_inverse=True)[1]
    count = int(numbers_present.max()) + 1
    random = np.random.default_rng(0)
    results = []
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(count, size=count), minlength=count)[numbers_present]
        weights = pairs.weights * times
        if weights.sum() > 0:
            results.append(figure(Pairs(pairs.differences, weights / weights.sum(), pairs.rankings, pairs.places)))
    low, high = np.percentile(results, [2.5, 97.5])
    return float(low), float(high)


def final_figures(scores: Scores, held_out: Sequence[Ranking], facts: Mapping[str, float]) -> dict[str, float]:
    """All figures of a finished reward model: also the accuracy's interval, the temperature and what it would mend.

    `facts` are those of `baselines`, among others, and are among the figures.
    """
    if not held_out:
        return dict(facts)
    pairs = pairs_of(scores, held_out)
    low, high = interval(pairs, held_out)
    after = calibrated(pairs, held_out)
    figures = figures_of(pairs) | {
        "accuracy_low": low,
        "accuracy_high": high,
        "temperature": temperature(pairs),
        "calibrated_loss": loss(after),
        "calibrated_error": calibration_error(after),
    }
    return figures | dict(facts) | {"ahead_of_length": figures["accuracy"] - facts["length_accuracy"]}


def score_range(scores: Scores, held_out: Sequence[Ranking]) -> dict[str, float]:
    """Where the scores of answers like those that were judged lie: beyond it a reward model is guessing.

    `score_low` and `score_high` are the 1% and 99% quantiles; `longest` is the length of the longest answer in
    characters. Empty when nothing is held out.
    """
    said = np.array([score for row in scores for score in row])
    if not len(said):
        return {}
    low, median, high = np.quantile(said, [0.01, 0.5, 0.99]).tolist()
    longest = max(len(response) for ranking in held_out for response in ranking.responses)
    ends = {"score_lowest": float(said.min()), "score_highest": float(said.max()), "score_std": float(said.std())}
    return {"score_low": low, "score_median": median, "score_high": high, **ends, "longest": float(longest)}


def calibrate(scores: Scores, figures: Mapping[str, float]) -> tuple[list[list[float]], dict[str, float]]:
    """Scores over the temperature, and the figures of them: those of prompts that it was not fitted to."""
    divided = [[score / figures["temperature"] for score in row] for row in scores]
    return divided, dict(figures) | {
        "loss": figures["calibrated_loss"],
        "calibration_error": figures["calibrated_error"],
        "uncalibrated_loss": figures["loss"],
        "uncalibrated_error": figures["calibration_error"],
    }


def _half(ranking: Ranking) -> bool:
    return bool(hashlib.sha256(prompt_key(ranking.prompt).encode()).digest()[0] & 1)
