"""Simulate the coverage of every interval that a gate can use, and the pass rates of the calibration gate.

  python benchmarks/coverage.py [--trials 1000] [--part accuracy|shares|means|length|calibration]

Each cell is the share of simulated files whose 95% interval contains the true value. Each table ends with the mean and
the minimum over its situations, and with those of the percentile bootstrap over prompts, which keel used previously.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch

from keel.data.preferences import Ranking
from keel.evaluation.judged import comparison, length_controlled_rate
from keel.stats.intervals import Interval, Numbers, mean_interval
from keel.stats.preference_metrics import NUM_BINS, Pairs, accuracy_interval, calibration_error, reliability

COUNTS = (3, 5, 10, 20, 50, 100, 200)
PAIRS = (20, 50, 100, 200, 300, 500, 1000)
DRAWS = 500
Generator = np.random.Generator
Trial = tuple[Interval, Numbers, Numbers, float]  # interval, above and below of each prompt, true value
Situation = Callable[[int, Generator], Trial]


def percentile(above: Numbers, below: Numbers, random: Generator) -> Interval:
    rows = random.integers(len(above), size=(DRAWS, len(above)))
    low, high = np.quantile(above[rows].sum(1) / below[rows].sum(1), [0.025, 0.975])
    return float(low), float(high)


def chances(mean: float, correlation: float, count: int, random: Generator) -> Numbers:
    """Draw the probability of each prompt from a beta distribution with this mean and within-prompt correlation."""
    if not correlation:
        return np.full(count, mean)
    size = (1 - correlation) / correlation
    return random.beta(mean * size, (1 - mean) * size, count)


def accuracy_of(mean: float, correlation: float, by_pair: bool) -> Situation:
    """Simulate accuracies with 1 to 6 pairs a prompt: one ranking of weight 1 a prompt, or one a pair (`by_pair`)."""

    def trial(count: int, random: Generator) -> Trial:
        sizes = random.integers(1, 7, count)
        right = random.random(sizes.sum()) < np.repeat(chances(mean, correlation, count, random), sizes)
        prompts = np.repeat(np.arange(count), sizes)
        weights = np.ones(len(right)) if by_pair else 1.0 / np.repeat(sizes, sizes)
        rankings = [Ranking(str(prompt), ("a", "b"), (1, 2)) for prompt in range(count)]
        pairs = Pairs(np.where(right, 1.0, -1.0), weights / weights.sum(), prompts, np.zeros((len(right), 2), int))
        above, below = np.bincount(prompts, weights * right), np.bincount(prompts, weights)
        return accuracy_interval(pairs, rankings), above, below, mean

    return trial


def win_rate(mean: float, correlation: float, copies: int, ties: float) -> Situation:
    """Simulate win rates with `copies` comparisons per prompt, some of them ties."""

    def trial(count: int, random: Generator) -> Trial:
        won = random.random((count, copies)) < chances(mean, correlation, count, random)[:, None]
        wins = np.where(random.random((count, copies)) < ties, 0.5, won)
        found = comparison(torch.tensor(wins), torch.full((count, 1), 0.5, dtype=torch.float64))
        ends = found["win_rate_low"], found["win_rate_high"]
        return ends, wins.mean(1), np.ones(count), ties / 2 + (1 - ties) * mean

    return trial


def mean_of(draw: Callable[[int, Generator], Numbers], true: float) -> Situation:
    def trial(count: int, random: Generator) -> Trial:
        values = draw(count, random)
        ones = np.ones(count)
        return mean_interval(values, ones), values, ones, true

    return trial


def summed_kl(shape: float, copies: int) -> Situation:
    """Draw the KL of a prompt from a gamma distribution of mean 5, and add the noise of its responses' log-ratios."""

    def draw(count: int, random: Generator) -> Numbers:
        kl = random.gamma(shape, 5 / shape, count)
        return kl + random.normal(size=count) * np.sqrt(2 * kl / copies)

    return mean_of(draw, 5.0)


def per_token(count: int, random: Generator) -> Trial:
    """Simulate a mean over tokens: longer responses count more, and have higher values."""
    lengths = random.gamma(3, 8, count) + 1
    sums = (0.5 + 0.2 * random.normal(size=count) + 0.004 * lengths) * lengths
    return mean_interval(sums, lengths), sums, lengths, 0.5 + 0.004 * (192 + 25**2) / 25


def length_controlled(rate: float, slope: float, copies: int, ahead: float) -> Situation:
    """Simulate wins with logit(rate) + slope tanh(d / 10); prompts differ in the logit and in the mean of d."""
    base = math.log(rate / (1 - rate))

    def trial(count: int, random: Generator) -> Trial:
        gaps = ahead + 7 * random.normal(size=(count, 1)) + 7 * random.normal(size=(count, copies))
        wins = random.random(gaps.shape) < 1 / (1 + np.exp(-(base + slope * np.tanh(gaps / 10))))
        prompts = torch.arange(count).repeat_interleave(copies)
        flat = torch.tensor(wins.astype(float)).flatten(), torch.tensor(gaps).flatten()
        found = length_controlled_rate(*flat, torch.full((count * copies,), 1 / copies, dtype=torch.float64), prompts)
        ends = found["length_controlled_win_rate_low"], found["length_controlled_win_rate_high"]
        return ends, wins.mean(1), np.ones(count), rate

    return trial


PARTS: dict[str, dict[str, Situation]] = {
    "accuracy": {
        f"accuracy {mean}, correlation {correlation}{', by pair' if by_pair else ''}": accuracy_of(
            mean, correlation, by_pair
        )
        for mean in (0.55, 0.7, 0.9, 0.97, 0.99)
        for correlation, by_pair in ((0.0, False), (0.3, False), (0.3, True), (0.8, False))
    },
    "shares": {
        f"win rate {mean}, {copies} responses, {ties:.0%} ties, correlation {correlation}": win_rate(
            mean, correlation, copies, ties
        )
        for mean in (0.5, 0.8, 0.95)
        for correlation in (0.1, 0.5)
        for copies, ties in ((1, 0.0), (1, 0.5), (4, 0.0), (4, 0.95), (16, 0.0), (16, 0.5))
    },
    "means": {
        "normal": mean_of(lambda count, random: random.normal(size=count), 0.0),
        "KL, gamma 2, 4 responses": summed_kl(2.0, 4),
        "KL, gamma 1, 1 response": summed_kl(1.0, 1),
        "KL, gamma 0.5, 4 responses": summed_kl(0.5, 4),
        "log-normal 0.5": mean_of(lambda count, random: random.lognormal(0, 0.5, count), math.exp(0.125)),
        "log-normal 1": mean_of(lambda count, random: random.lognormal(0, 1, count), math.exp(0.5)),
        "per token": per_token,
    },
    "length": {
        f"rate {rate}, slope {slope}, {copies} comparisons, longer by {ahead}": length_controlled(
            rate, slope, copies, ahead
        )
        for rate in (0.5, 0.7, 0.9)
        for slope, ahead in ((0.0, 0.0), (1.0, 5.0))
        for copies in (1, 4)
    },
}


def coverage(situation: Situation, count: int, trials: int, seed: int) -> tuple[float, float]:
    """Return the coverage of keel's interval and of the percentile bootstrap. Unidentified metrics have no interval."""
    random = np.random.default_rng(seed)
    held, before, known = 0, 0, 0
    for _ in range(trials):
        (low, high), above, below, true = situation(count, random)
        if math.isnan(low):
            continue
        known += 1
        held += low - 1e-9 <= true <= high + 1e-9
        former = percentile(above, below, random)
        before += former[0] - 1e-9 <= true <= former[1] + 1e-9
    return held / known if known else math.nan, before / known if known else math.nan


def print_coverage(part: str, trials: int) -> None:
    print(f"\n{part}: coverage by the number of prompts")
    print(f"{'':58}" + "".join(f"{count:>7}" for count in COUNTS))
    table = []
    for name, situation in PARTS[part].items():
        row = [coverage(situation, count, trials, count) for count in COUNTS]
        table.append(row)
        print(f"{name:58}" + "".join(f"{now:7.3f}" for now, _ in row), flush=True)
    numbers = np.array(table)
    for place, method in enumerate(("keel", "percentile bootstrap")):
        if place and part == "length":
            continue  # its bootstrap refits the regression; prompts' win rates are another figure
        for name, values in (("mean", np.nanmean(numbers, 0)), ("least", np.nanmin(numbers, 0))):
            print(f"{f'{method}, {name}':58}" + "".join(f"{value:7.3f}" for value in values[:, place]))


def plug_in(pairs: Pairs) -> float:
    """Expected calibration error in ten equal bins (Naeini et al. 2015), as keel computed it previously."""
    return sum(share * abs(right - confidence) for share, right, confidence in reliability(pairs))


def print_calibration(trials: int) -> None:
    """Print pass rates of models whose probabilities are too high by `error`; differences are N(0, 1.5^2)."""
    print(f"\ncalibration: share of files that pass, {NUM_BINS} bins at most")
    header = ("error", "pairs", "plug-in<=.05", "ece<=.05", "ece<=.1", "ece_high<=.1", "coverage")
    print("".join(f"{name:>14}" for name in header))
    for error in (0.0, 0.1, 0.2):
        for count in PAIRS:
            random = np.random.default_rng(count)
            passed = np.zeros(5)
            for _ in range(trials):
                size = np.abs(random.normal(0, 1.5, count))
                right = random.random(count) < 1 / (1 + np.exp(-size)) - error
                rows = np.arange(count)
                pairs = Pairs(np.where(right, size, -size), np.full(count, 1 / count), rows, np.zeros((count, 2), int))
                gap = calibration_error(pairs)
                low, high = gap.interval
                passed += (plug_in(pairs) <= 0.05, gap.root <= 0.05, gap.root <= 0.1, high <= 0.1, low <= error <= high)
            print(f"{error:14}{count:14}" + "".join(f"{value:14.2f}" for value in passed / trials), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--part", choices=[*PARTS, "calibration"], action="append")
    given = parser.parse_args()
    for part in given.part or [*PARTS, "calibration"]:
        print_calibration(given.trials) if part == "calibration" else print_coverage(part, given.trials)


if __name__ == "__main__":
    main()
