"""Metrics of scores on held-out rankings, and of the baseline that prefers by length alone."""

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
    """All pairs of responses with a preference. The weight of a ranking is divided equally among its pairs."""

    differences: Numbers  # [M] score of the better minus score of the worse response
    weights: Numbers  # [M], sum 1
    rankings: NDArray[np.int64]  # [M] index of the ranking
    places: NDArray[np.int64]  # [M, 2] indices of the better and the worse response

    @property
    def wins(self) -> Numbers:
        """1 where the scores agree with the rater, 1/2 where the two scores are equal. [M]"""
        return (self.differences > 0) + 0.5 * (self.differences == 0)

    def where(self, chosen: NDArray[np.bool_]) -> "Pairs":
        """Select pairs [M] and scale their weights to the sum 1."""
        weights = self.weights[chosen]
        return Pairs(
            self.differences[chosen], weights / weights.sum(), self.rankings[chosen], self.places[chosen]
        )  # fmt: skip

    def scale(self, factor: Numbers | float) -> "Pairs":
        return Pairs(self.differences * factor, self.weights, self.rankings, self.places)


def build_pairs(scores: Scores, rankings: Sequence[Ranking]) -> Pairs:
    """Return the pairs of all rankings; a ranking without a preference has none."""
    rows = [
        (values[better] - values[worse], ranking.weight / len(ranking.pairs), number, better, worse)
        for number, (values, ranking) in enumerate(zip(scores, rankings, strict=True))
        for better, worse in ranking.pairs
    ]
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return Pairs(table[:, 0], table[:, 1] / table[:, 1].sum(), table[:, 2].astype(int), table[:, 3:].astype(int))


def compute_preference_metrics(scores: Scores, held_out: Sequence[Ranking]) -> dict[str, float]:
    """Compute `accuracy`, `loss` and `calibration_error` over all pairs with a preference; empty without rankings.

    The accuracy is the share of pairs in the right order, equal scores counting half. The loss is that of Bradley and
    Terry, in nats.
    """
    return pair_metrics(build_pairs(scores, held_out), held_out) if held_out else {}


def pair_metrics(pairs: Pairs, rankings: Sequence[Ranking]) -> dict[str, float]:
    error = calibration_error(pairs, prompt_numbers(pairs, rankings)).root
    return {"accuracy": accuracy(pairs), "loss": loss(pairs), "calibration_error": error}


def baselines(held_out: Sequence[Ranking], train: Sequence[Ranking]) -> dict[str, float]:
    """Compute the metrics of two scorers that do not read the text; empty without held-out rankings.

    `length_*` scores by the number of characters, or by its negative where shorter responses win more often in `train`
    (`length_sign`). `constant_*` gives every response the same score.
    """
    with_pairs = [ranking for ranking in train if ranking.pairs]
    if not held_out or not with_pairs:
        return {}
    sign = 1.0 if accuracy(build_pairs(response_lengths(with_pairs), with_pairs)) >= 0.5 else -1.0
    return {
        "length_accuracy": accuracy(build_pairs(response_lengths(held_out), held_out).scale(sign)),
        "length_sign": sign,
        "constant_accuracy": 0.5,
        "constant_loss": math.log(2),
    }


def response_lengths(rankings: Sequence[Ranking]) -> list[list[float]]:
    """Return the number of characters of each response, ranking by ranking."""
    return [[float(len(response)) for response in ranking.responses] for ranking in rankings]


def accuracy(pairs: Pairs) -> float:
    return float(pairs.weights @ pairs.wins)


def loss(pairs: Pairs) -> float:
    """Compute the mean Bradley-Terry loss, log(1 + exp(-difference)), in nats."""
    return float(pairs.weights @ np.logaddexp(0.0, -pairs.differences))


def calibration_error(pairs: Pairs, prompts: NDArray[np.int64] | None = None) -> SquaredGap:
    """Estimate the squared calibration error of the scores; `root` of the result is the calibration error.

    Scores state that the response with the higher score is the better one with probability sigma(|difference|).

    Args:
        prompts: [M], number of each pair's prompt, by default of its ranking. Pairs of one prompt are dependent.
    """
    return squared_gap(
        confidences(pairs), pairs.wins, pairs.weights, pairs.rankings if prompts is None else prompts
    )  # fmt: skip


def confidences(pairs: Pairs) -> Numbers:
    """Return the stated probability that the response with the higher score is the better one, 1/2 to 1. -> [M]"""
    return np.exp(-np.logaddexp(0.0, -np.abs(pairs.differences)))


def reliability(pairs: Pairs) -> list[tuple[float, float, float]]:
    """Return the share of the weight, the accuracy and the mean confidence of each bin that is not empty."""
    confidence = confidences(pairs)
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    shares, right, sure = (
        np.bincount(bins, pairs.weights * values, NUM_BINS) for values in (1.0, pairs.wins, confidence)
    )
    filled = np.flatnonzero(shares)
    return [(float(shares[i]), float(right[i] / shares[i]), float(sure[i] / shares[i])) for i in filled]


def temperature(pairs: Pairs) -> float:
    """Find the number between 0.01 and 100 by which to divide the scores for the lowest loss (Guo et al. 2017).

    The loss includes one more ranking of the usual difference that went either way equally often. Without it, a few
    pairs that are all in the right order would give the temperature 0. The loss is convex in 1 / temperature, so the
    lowest loss is where its slope is 0, and the search halves the interval.
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
    """Divide the differences of each half of the prompts by the temperature fitted to the other half.

    Metrics of the result are unbiased by the fit: no pair has a part in the temperature that divides it.
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
    """Compute all metrics of a finished reward model, with intervals and calibration.

    Args:
        facts: metrics of the data, among them those of `baselines`. They become part of the result.
    """
    if not held_out:
        return dict(facts)
    pairs = build_pairs(scores, held_out)
    prompts, calibrated = prompt_numbers(pairs, held_out), calibrate_pairs(pairs, held_out)
    metrics, calibrated_error = pair_metrics(pairs, held_out), calibration_error(calibrated, prompts)
    for name, (low, high) in {
        "accuracy": accuracy_interval(pairs, held_out),
        "calibration_error": calibration_error(pairs, prompts).interval,
        "calibrated_error": calibrated_error.interval,
    }.items():
        metrics |= {f"{name}_low": low, f"{name}_high": high}
    metrics |= {
        "temperature": temperature(pairs),
        "calibrated_loss": loss(calibrated),
        "calibrated_error": calibrated_error.root,
    }
    return metrics | dict(facts) | {"ahead_of_length": metrics["accuracy"] - facts["length_accuracy"]}


def score_range(scores: Scores, held_out: Sequence[Ranking]) -> dict[str, float]:
    """Summarise the scores of held-out responses. A score outside this range is a guess of the reward model.

    `score_low` and `score_high` are the 1% and 99% quantiles; `longest` is the number of characters of the longest
    response. Empty without held-out rankings.
    """
    flat = np.array([score for row in scores for score in row])
    if not len(flat):
        return {}
    low, median, high = np.quantile(flat, [0.01, 0.5, 0.99]).tolist()
    longest = max(len(response) for ranking in held_out for response in ranking.responses)
    ends = {"score_lowest": float(flat.min()), "score_highest": float(flat.max()), "score_std": float(flat.std())}
    return {"score_low": low, "score_median": median, "score_high": high, **ends, "longest": float(longest)}


def calibrate(scores: Scores, metrics: Mapping[str, float]) -> tuple[list[list[float]], dict[str, float]]:
    """Divide the scores by the temperature. Return them, and their metrics on prompts that it was not fitted to."""
    divided = [[score / metrics["temperature"] for score in row] for row in scores]
    return divided, dict(metrics) | {
        "loss": metrics["calibrated_loss"],
        **{f"calibration_error{end}": metrics[f"calibrated_error{end}"] for end in ("", "_low", "_high")},
        "uncalibrated_loss": metrics["loss"],
        "uncalibrated_error": metrics["calibration_error"],
    }


def _half(ranking: Ranking) -> bool:
    # A hash, so that a prompt stays in its half whatever other rows the file has.
    return bool(hashlib.sha256(prompt_key(ranking.prompt).encode()).digest()[0] & 1)
