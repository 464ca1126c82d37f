"""Metrics of evaluated responses: their means, the comparison of two policies, and 95% intervals over prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.core.win_rate import LEAST_OVERLAP, length_controlled_deviation, length_controlled_win_rate, length_overlap
from keel.data.preferences import prompt_key
from keel.data.prompts import Prompt
from keel.stats.intervals import Interval, mean_interval, share_interval, t_quantile

PER_TOKEN = ("entropy", "reference_logprob")  # reported as means over tokens; all others as means over responses
Metrics = dict[str, float]


@dataclass(frozen=True)
class EvaluatedResponses:
    """The responses of a policy, k to each of N prompts, and their measurements."""

    prompts: list[Prompt]
    texts: list[list[str]]
    measured: dict[str, Tensor]  # name -> [N, k]; the names in PER_TOKEN have sums over the response's tokens

    def rows(self, chosen: Sequence[int]) -> "EvaluatedResponses":
        """Select prompts by their index."""
        measured = {name: values[list(chosen)] for name, values in self.measured.items()}
        return EvaluatedResponses([self.prompts[row] for row in chosen], [self.texts[row] for row in chosen], measured)

    def summary(self) -> Metrics:
        """Compute one mean for each measurement, over all responses."""
        tokens = self.measured["length"].sum()
        return {
            name: float(values.sum() / tokens) if name in PER_TOKEN else float(values.nanmean())
            for name, values in self.measured.items()
        }

    @property
    def clusters(self) -> Tensor:
        """The number of each row's prompt, from 0. Rows with the same prompt have the same number. [N]"""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(prompt_key(prompt.content), len(numbers)) for prompt in self.prompts])

    def compute_metrics(self) -> Metrics:
        """Compute the summary, each metric NAME with its interval NAME_low and NAME_high."""
        metrics: Metrics = {}
        clusters = self.clusters
        for name, value in self.summary().items():
            values = self.measured[name]
            above, below = sum_by_prompt(values.nansum(1), clusters), sum_by_prompt(self._counts(name), clusters)
            method = share_interval if is_share(name, values) else mean_interval
            metrics |= interval_entries(name, value, method(above.numpy(), below.numpy()))
        return metrics

    def _counts(self, name: str) -> Tensor:
        """Return the weight of each row in a mean: its number of tokens or of finite values. [N]"""
        return (self.measured["length"] if name in PER_TOKEN else self.measured[name].isfinite()).double().sum(1)


def is_share(name: str, values: Tensor) -> bool:
    """Whether a metric is a share of responses: `truncated`, or a scorer that returns only 0 and 1."""
    known = values[values.isfinite()]
    return name == "truncated" or (name.startswith(("score", "rewards/")) and bool(((known == 0) | (known == 1)).all()))


def sum_by_prompt(values: Tensor, clusters: Tensor) -> Tensor:
    """Sum the rows of each prompt. [N, ...], [N] -> [G, ...]"""
    sums = torch.zeros(int(clusters.max()) + 1, *values.shape[1:], dtype=torch.float64)
    return sums.index_add_(0, clusters, values.double().cpu())


def interval_entries(name: str, value: float, interval: Interval) -> Metrics:
    """Return the entries NAME, NAME_low and NAME_high."""
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def comparison(ours: Tensor, theirs: Tensor, clusters: Tensor | None = None) -> Metrics:
    """Compute win rate, score difference and share of ties, with intervals. Empty if no pair has both scores.

    The win rate of a row is over all pairs of our and their responses to its prompt, a tie counting half. Pairs with a
    response that has no score are left out.

    Args:
        ours: scores [N, k].
        theirs: scores [N, j].
        clusters: number of each row's prompt [N], by default a different one for each row.
    """
    difference = (ours.unsqueeze(2) - theirs.unsqueeze(1)).cpu()
    has_pair = difference.flatten(1).isfinite().any(1)
    if not bool(has_pair.any()):
        return {}
    numbers = (torch.arange(len(difference)) if clusters is None else clusters)[has_pair]
    difference = difference[has_pair]
    known = difference.isfinite()
    by_pair = {
        "ties": (difference == 0).double(),
        "win_rate": (difference.sign().double() + 1) / 2,
        "score_difference": difference.double(),
    }
    metrics: Metrics = {}
    for name, values in by_pair.items():
        rows = values.masked_fill(~known, torch.nan).flatten(1).nanmean(1)
        metrics |= row_mean(name, rows, numbers, is_share=name != "score_difference")
    return metrics


def row_mean(name: str, values: Tensor, clusters: Tensor, is_share: bool = True) -> Metrics:
    """Compute the mean of one value a row [N], with its interval over prompts."""
    numbers = clusters.unique(return_inverse=True)[1]
    above, below = sum_by_prompt(values, numbers), sum_by_prompt(torch.ones_like(values), numbers)
    method = share_interval if is_share else mean_interval
    return interval_entries(name, float(values.mean()), method(above.numpy(), below.numpy()))


def length_controlled_comparison(ours: EvaluatedResponses, theirs: EvaluatedResponses, measure: str) -> Metrics:
    """Estimate the win rate at equal lengths (`core.win_rate`). Each row has the same weight."""
    difference = (ours.measured[measure].unsqueeze(2) - theirs.measured[measure].unsqueeze(1)).cpu()
    longer_by = (ours.measured["length"].unsqueeze(2) - theirs.measured["length"].unsqueeze(1)).cpu()
    wins, known = (difference.sign() + 1) / 2, difference.isfinite()
    rows = torch.arange(len(difference)).view(-1, 1, 1).expand(difference.shape)[known]
    shares = (1 / known.flatten(1).sum(1).double())[rows]
    return length_controlled_rate(wins[known], longer_by[known], shares, ours.clusters[rows])


def length_controlled_rate(wins: Tensor, longer_by: Tensor, shares: Tensor, prompts: Tensor) -> Metrics:
    """Estimate the win rate at equal lengths from M comparisons, with a t interval of its logit. Empty without any.

    NaN where one side is longer in nearly all comparisons (`length_overlap` below LEAST_OVERLAP): the estimate would
    depend on the form of the regression alone.

    Args:
        wins: [M], 1 for a win, 1/2 for a tie, 0 for a loss.
        longer_by: [M], our length minus theirs.
        shares: [M], weight of each comparison.
        prompts: [M], number of the prompt of each comparison.
    """
    if not len(wins):
        return {}
    clusters, count = prompts.unique(return_inverse=True)[1], len(prompts.unique())
    overlap = length_overlap(longer_by, shares)
    value, ends = math.nan, (math.nan, math.nan)
    if overlap >= LEAST_OVERLAP:
        value = float(wins[0])
        if bool((wins == wins[0]).all()):  # nothing varies, so length explains nothing, and the regression has no fit
            below = sum_by_prompt(shares, clusters)
            ends = share_interval((below * value).numpy(), below.numpy())
        else:
            value = float(length_controlled_win_rate(wins, longer_by, shares))
            ends = _logit_interval(value, length_controlled_deviation(wins, longer_by, shares, clusters), count)
    return {**interval_entries("length_controlled_win_rate", value, ends), "length_overlap": overlap}


def _logit_interval(value: float, deviation: float, count: int) -> Interval:
    """Return the interval of a rate whose logit has this standard deviation, estimated from `count` prompts."""
    if count < 3:  # the regression has two coefficients, so no degree of freedom is left
        return 0.0, 1.0
    logit, half = torch.tensor(value, dtype=torch.float64).logit(), t_quantile(count - 2) * deviation
    return float(torch.sigmoid(logit - half)), float(torch.sigmoid(logit + half))
