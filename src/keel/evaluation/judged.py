"""Figures of judged answers: their means, those of two policies side by side, and 95% intervals over prompts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.core.win_rate import LEAST_OVERLAP, length_controlled_deviation, length_controlled_win_rate, length_overlap
from keel.data.preferences import prompt_key
from keel.data.prompts import Prompt
from keel.stats.intervals import Interval, mean_interval, share_interval, t_quantile
from keel.world import generator

PER_TOKEN = ("entropy", "reference_logprob")  # reported as means over tokens; the rest as means over answers
AT_ONCE = 2**22  # numbers held in memory while resampling; no figure depends on it
Metrics = dict[str, float]


@dataclass(frozen=True)
class EvaluatedResponses:
    """A policy's answers, N prompts and k to each, and what was measured of them."""

    prompts: list[Prompt]
    texts: list[list[str]]
    measured: dict[str, Tensor]  # name -> [N, k]; the names of PER_TOKEN hold sums over the answer's tokens

    def rows(self, chosen: Sequence[int]) -> "EvaluatedResponses":
        """Some of the prompts."""
        measured = {name: values[list(chosen)] for name, values in self.measured.items()}
        return EvaluatedResponses([self.prompts[row] for row in chosen], [self.texts[row] for row in chosen], measured)

    def summary(self) -> Metrics:
        """One figure for each measure, over all answers."""
        tokens = self.measured["length"].sum()
        return {
            name: float(values.sum() / tokens) if name in PER_TOKEN else float(values.nanmean())
            for name, values in self.measured.items()
        }

    @property
    def clusters(self) -> Tensor:
        """Number of each row's prompt, from 0 on: the same prompt in two rows is one prompt. [N]"""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(prompt_key(prompt.content), len(numbers)) for prompt in self.prompts])

    def compute_metrics(self) -> Metrics:
        """The summary, each figure NAME with its interval NAME_low and NAME_high."""
        found: Metrics = {}
        clusters = self.clusters
        for name, value in self.summary().items():
            values = self.measured[name]
            above, below = by_prompt(values.nansum(1), clusters), by_prompt(self._counts(name), clusters)
            method = share_interval if is_share(name, values) else mean_interval
            found |= with_interval(name, value, method(above.numpy(), below.numpy()))
        return found

    def _counts(self, name: str) -> Tensor:
        """How much each prompt counts in a figure. [N]"""
        return (self.measured["length"] if name in PER_TOKEN else self.measured[name].isfinite()).double().sum(1)


def is_share(name: str, values: Tensor) -> bool:
    """Whether a figure is a share of responses: truncated, or a scorer that gives nothing but 0 and 1."""
    known = values[values.isfinite()]
    return name == "truncated" or (name.startswith(("score", "rewards/")) and bool(((known == 0) | (known == 1)).all()))


def by_prompt(values: Tensor, clusters: Tensor) -> Tensor:
    """Sum over the rows of each prompt. [N, ...], [N] -> [G, ...]"""
    sums = torch.zeros(int(clusters.max()) + 1, *values.shape[1:], dtype=torch.float64)
    return sums.index_add_(0, clusters, values.double().cpu())


def with_interval(name: str, value: float, interval: Interval) -> Metrics:
    """NAME, NAME_low and NAME_high."""
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def resamples(count: int, seed: int, draws: int, width: int = 1) -> Iterator[Tensor]:
    """How often each of `count` prompts is in each of `draws` samples of them, in parts [at once, count] (Efron 1979).

    `width` numbers will be held for each prompt and sample.
    """
    numbers = generator(seed, "bootstrap")
    at_once = max(1, AT_ONCE // (count * width))
    for start in range(0, draws, at_once):
        drawn = torch.randint(count, (min(at_once, draws - start), count), generator=numbers)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(()).expand(drawn.shape).double()
        )


def comparison(ours: Tensor, theirs: Tensor, clusters: Tensor | None = None) -> Metrics:
    """Win rate, score difference and share of ties with intervals, from scores [N, k] and [N, j].

    A row's win rate is that of all pairs of our and their answers to its prompt; a tie counts half. Pairs of which an
    answer has no score are left out; empty if that leaves none. `clusters` [N] numbers the prompts (default: rows).
    """
    difference = (ours.unsqueeze(2) - theirs.unsqueeze(1)).cpu()
    told = difference.flatten(1).isfinite().any(1)
    if not bool(told.any()):
        return {}
    numbers = (torch.arange(len(difference)) if clusters is None else clusters)[told]
    difference = difference[told]
    known = difference.isfinite()
    parts = {
        "ties": (difference == 0).double(),
        "win_rate": (difference.sign().double() + 1) / 2,
        "score_difference": difference.double(),
    }
    metrics: Metrics = {}
    for name, values in parts.items():
        rows = values.masked_fill(~known, torch.nan).flatten(1).nanmean(1)
        metrics |= row_mean(name, rows, numbers, is_share=name != "score_difference")
    return metrics


def row_mean(name: str, values: Tensor, clusters: Tensor, is_share: bool = True) -> Metrics:
    """The mean of what each row says [N], with its interval over prompts."""
    numbers = clusters.unique(return_inverse=True)[1]
    above, below = by_prompt(values, numbers), by_prompt(torch.ones_like(values), numbers)
    method = share_interval if is_share else mean_interval
    return with_interval(name, float(values.mean()), method(above.numpy(), below.numpy()))


def length_controlled_comparison(ours: EvaluatedResponses, theirs: EvaluatedResponses, measure: str) -> Metrics:
    """The win rate that would remain if both answers were of one length; each row counts alike (`core.win_rate`)."""
    difference = (ours.measured[measure].unsqueeze(2) - theirs.measured[measure].unsqueeze(1)).cpu()
    longer_by = (ours.measured["length"].unsqueeze(2) - theirs.measured["length"].unsqueeze(1)).cpu()
    wins, known = (difference.sign() + 1) / 2, difference.isfinite()
    rows = torch.arange(len(difference)).view(-1, 1, 1).expand(difference.shape)[known]
    shares = (1 / known.flatten(1).sum(1).double())[rows]
    return length_controlled_rate(wins[known], longer_by[known], shares, ours.clusters[rows])


def length_controlled_rate(wins: Tensor, longer_by: Tensor, shares: Tensor, prompts: Tensor) -> Metrics:
    """From comparisons [M], how much each counts, and which prompt it belongs to. Empty without any.

    The interval is a t interval of the logit. nan where one side is longer in all or nearly all comparisons
    (`length_overlap` below LEAST_OVERLAP): the rate at equal lengths would rest on the form of the regression alone.
    """
    if not len(wins):
        return {}
    clusters, count = prompts.unique(return_inverse=True)[1], len(prompts.unique())
    overlap = length_overlap(longer_by, shares)
    value, ends = math.nan, (math.nan, math.nan)
    if overlap >= LEAST_OVERLAP:
        value = float(wins[0])
        if bool((wins == wins[0]).all()):  # length can explain nothing
            below = by_prompt(shares, clusters)
            ends = share_interval((below * value).numpy(), below.numpy())
        else:
            value = float(length_controlled_win_rate(wins, longer_by, shares))
            ends = _logit_interval(value, length_controlled_deviation(wins, longer_by, shares, clusters), count)
    return {**with_interval("length_controlled_win_rate", value, ends), "length_overlap": overlap}


def _logit_interval(value: float, deviation: float, count: int) -> Interval:
    """The ends for a rate whose logit has this standard deviation, from `count` prompts."""
    if count < 3:  # two coefficients leave no degree of freedom
        return 0.0, 1.0
    logit, half = torch.tensor(value, dtype=torch.float64).logit(), t_quantile(count - 2) * deviation
    return float(torch.sigmoid(logit - half)), float(torch.sigmoid(logit + half))
