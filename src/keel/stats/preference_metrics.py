"""How good scores are on held-out rankings, beside what length alone would say. Knows scores and no model."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel.data.preferences import Ranking, prompt_key
from keel.stats.calibration import NUM_BINS, SquaredGap, squared_gap
from keel.stats.intervals import Interval, share_interval

Scores = Sequence[Sequence[float]]
"""One score for each response of each ranking."""
Numbers = NDArray[np.float64]


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

    def scale(self, factor: Numbers | float) -> "Pairs":
        return Pairs(self.differences * factor, self.weights, self.rankings, self.places)


def build_pairs(scores: Scores, rankings: Sequence[Ranking]) -> Pairs:
    """Raises nothing: a ranking that prefers nothing adds nothing."""
    rows = [
        (values[better] - values[worse], ranking.weight / len(ranking.pairs), number, better, worse)
        for number, (values, ranking) in enumerate(zip(scores, rankings, strict=True))
        for better, worse in ranking.pairs
    ]
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return Pairs(table[:, 0], table[:, 1] / table[:, 1].sum(), table[:, 2].astype(int), table[:, 3:].astype(int))


def compute_preference_metrics(scores: Scores, held_out: Sequence[Ranking]) -> dict[str, float]:
    """Figures over all pairs of answers that were told apart; empty without rankings.

    accuracy: pairs in the right order, equal scores counting half. loss: Bradley-Terry, in nats.
    """
    return pair_metrics(build_pairs(scores, held_out), held_out) if held_out else {}


def pair_metrics(pairs: Pairs, rankings: Sequence[Ranking]) -> dict[str, float]:
    error = calibration_error(pairs, prompt_numbers(pairs, rankings)).root
    return {"accuracy": accuracy(pairs), "loss": loss(pairs), "calibration_error": error}


def baselines(held_out: Sequence[Ranking], train: Sequence[Ranking]) -> dict[str, float]:
    """The same figures for scorers that read nothing; empty without held-out rankings.

    length: the number of characters, or its negative where shorter answers win more often in `train` (length_sign).
    constant: the same score for all answers.
    """
    telling = [ranking for ranking in train if ranking.pairs]
    if not held_out or not telling:
        return {}
    sign = 1.0 if accuracy(build_pairs(response_lengths(telling), telling)) >= 0.5 else -1.0
    return {
        "length_accuracy": accuracy(build_pairs(response_lengths(held_out), held_out).scale(sign)),
        "length_sign": sign,
        "constant_accuracy": 0.5,
        "constant_loss": math.log(2),
    }


def response_lengths(rankings: Sequence[Ranking]) -> list[list[float]]:
    """Characters of each response."""
    return [[float(len(response)) for response in ranking.responses] for ranking in rankings]


def accuracy(pairs: Pairs) -> float:
    return float(pairs.weights @ pairs.wins)


def loss(pairs: Pairs) -> float:
    """Mean Bradley-Terry loss, log(1 + exp(-difference)), in nats."""
    return float(pairs.weights @ np.logaddexp(0.0, -pairs.differences))


def calibration_error(pairs: Pairs, prompts: NDArray[np.int64] | None = None) -> SquaredGap:
    """Estimate how far the scores are from meaning what they state; the calibration error is its `root`.

    They state that the response with the higher score is the better one with probability sigma(|difference|).
    `prompts` [M] is the prompt of each pair, by default its ranking; the pairs of one are dependent.
    """
    return squared_gap(
        confidences(pairs), pairs.wins, pairs.weights, pairs.rankings if prompts is None else prompts
    )  # fmt: skip


def confidences(pairs: Pairs) -> Numbers:
    """Stated probability that the preferred response is the better one, from 1/2 to 1. -> [M]"""
    return np.exp(-np.logaddexp(0.0, -np.abs(pairs.differences)))


def reliability(pairs: Pairs) -> list[tuple[float, float, float]]:
    """For each bin that holds a pair: its share of all weight, the accuracy in it, and the mean confidence."""
    confidence = confidences(pairs)
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


def calibrate_pairs(pairs: Pairs, rankings: Sequence[Ranking]) -> Pairs:
    """The differences of each half of the prompts, divided by the temperature that fits the other half.

    A figure of these is a fair one: no pair was looked at in choosing what divides it.
    """
    halves = np.array([_half(ranking) for ranking in rankings])[pairs.rankings]
    factors = np.ones(len(halves))
    for half in (False, True):
        others = halves != half
        if others.any():
            factors[~others] = 1 / temperature(pairs.where(others))
    return pairs.scale(factors)


def prompt_numbers(pairs: Pairs, rankings: Sequence[Ranking]) -> NDArray[np.int64]:
    """Return the number of each pair's prompt, from 0 on. -> [M]"""
    keys = [prompt_key(ranking.prompt) for ranking in rankings]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    prompts = np.array([numbers[key] for key in keys], dtype=np.int64)[pairs.rankings]
    return np.unique(prompts, return_inverse=True)[1]


def accuracy_interval(pairs: Pairs, rankings: Sequence[Ranking]) -> Interval:
    """Return the 95% interval of the accuracy, with prompts as clusters."""
    prompts = prompt_numbers(pairs, rankings)
    above, below = (
        np.bincount(prompts, values).astype(float) for values in (pairs.weights * pairs.wins, pairs.weights)
    )
    return share_interval(above, below)


def final_metrics(scores: Scores, held_out: Sequence[Ranking], facts: Mapping[str, float]) -> dict[str, float]:
    """All figures of a finished reward model: also the accuracy's interval, the temperature and what it would mend.

    `facts` are those of `baselines`, among others, and are among the figures.
    """
    if not held_out:
        return dict(facts)
    pairs = build_pairs(scores, held_out)
    prompts, after = prompt_numbers(pairs, held_out), calibrate_pairs(pairs, held_out)
    metrics, error_after = pair_metrics(pairs, held_out), calibration_error(after, prompts)
    for name, (low, high) in {
        "accuracy": accuracy_interval(pairs, held_out),
        "calibration_error": calibration_error(pairs, prompts).interval,
        "calibrated_error": error_after.interval,
    }.items():
        metrics |= {f"{name}_low": low, f"{name}_high": high}
    metrics |= {
        "temperature": temperature(pairs),
        "calibrated_loss": loss(after),
        "calibrated_error": error_after.root,
    }
    return metrics | dict(facts) | {"ahead_of_length": metrics["accuracy"] - facts["length_accuracy"]}


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


def calibrate(scores: Scores, metrics: Mapping[str, float]) -> tuple[list[list[float]], dict[str, float]]:
    """Scores over the temperature, and the figures of them: those of prompts that it was not fitted to."""
    divided = [[score / metrics["temperature"] for score in row] for row in scores]
    return divided, dict(metrics) | {
        "loss": metrics["calibrated_loss"],
        **{f"calibration_error{end}": metrics[f"calibrated_error{end}"] for end in ("", "_low", "_high")},
        "uncalibrated_loss": metrics["loss"],
        "uncalibrated_error": metrics["calibration_error"],
    }


def _half(ranking: Ranking) -> bool:
    return bool(hashlib.sha256(prompt_key(ranking.prompt).encode()).digest()[0] & 1)
