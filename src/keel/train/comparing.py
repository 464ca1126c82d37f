"""Figures of judged answers: their means, those of two policies side by side, and 95% intervals over prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.core.win_rate import length_controlled
from keel.data.prompts import Prompt
from keel.world import generator

PER_TOKEN = ("entropy", "reference_logprob")  # reported as means over tokens; the rest as means over answers
RESAMPLES = 10_000
REGRESSIONS = 1_000  # resamples of what has to be fitted anew in each
AT_ONCE = 2**22  # numbers held in memory while resampling; no figure depends on it
Figures = dict[str, float]


@dataclass(frozen=True)
class Judged:
    """A policy's answers, N prompts and k to each, and what was measured of them."""

    prompts: list[Prompt]
    texts: list[list[str]]
    measured: dict[str, Tensor]  # name -> [N, k]; the names of PER_TOKEN hold sums over the answer's tokens

    def rows(self, chosen: Sequence[int]) -> "Judged":
        """Some of the prompts."""
        measured = {name: values[list(chosen)] for name, values in self.measured.items()}
        return Judged([self.prompts[row] for row in chosen], [self.texts[row] for row in chosen], measured)

    def summary(self) -> Figures:
        """One figure for each measure, over all answers."""
        tokens = self.measured["length"].sum()
        return {
            name: float(values.sum() / tokens) if name in PER_TOKEN else float(values.nanmean())
            for name, values in self.measured.items()
        }

    def figures(self, seed: int) -> Figures:
        """The summary, each figure NAME with its interval NAME_low and NAME_high."""
        above = torch.stack([values.nansum(1) for values in self.measured.values()], 1)
        below = torch.stack([self._counts(name) for name in self.measured], 1)
        figures = self.summary()
        intervals = dict(zip(figures, ratio_intervals(above, below, seed), strict=True))
        intervals["truncated"] = share_interval(figures["truncated"], intervals["truncated"], len(self.texts))
        return with_intervals(figures, list(intervals.values()))

    def _counts(self, name: str) -> Tensor:
        """How much each prompt counts in a figure. [N]"""
        return (self.measured["length"] if name in PER_TOKEN else self.measured[name].isfinite()).double().sum(1)


def share_interval(share: float, interval: tuple[float, float], count: int) -> tuple[float, float]:
    """The interval of a share of `count` prompts, also where samples of them cannot differ since all say the same.

    Then the exact limits stand: others may be as many as stay unseen in 2.5% of such files (Clopper and Pearson 1934).
    """
    unseen = 1 - 0.025 ** (1 / count)
    return {0.0: (0.0, unseen), 1.0: (1 - unseen, 1.0)}.get(share, interval)


def with_intervals(figures: Mapping[str, float], intervals: Sequence[tuple[float, float]]) -> Figures:
    """NAME, NAME_low and NAME_high of each figure."""
    found: Figures = {}
    for (name, value), (low, high) in zip(figures.items(), intervals, strict=True):
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found


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


def ratio_intervals(
    above: Tensor, below: Tensor, seed: int, draws: int = RESAMPLES, level: float = 0.95
) -> list[tuple[float, float]]:
    """Percentile interval over prompts of each column's sum above / sum below, from [N, F] and [N, F]; all columns see
    the same samples."""
    table = torch.cat([above, below], 1).double().cpu()
    sums = torch.cat([times @ table for times in resamples(len(table), seed, draws)])
    ratios = sums[:, : above.shape[1]] / sums[:, above.shape[1] :]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = ratios.nanquantile(tails, 0).tolist()
    return list(zip(low, high, strict=True))


def bootstrap_interval(values: Tensor, seed: int, level: float = 0.95, draws: int = RESAMPLES) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [N]."""
    return ratio_intervals(values.unsqueeze(1), torch.ones_like(values).unsqueeze(1), seed, draws, level)[0]


def comparison(ours: Tensor, theirs: Tensor, seed: int) -> Figures:
    """Win rate, score difference and share of ties with intervals, from scores [N, k] and [N, j].

    A prompt's win rate is that of all pairs of our and their answers to it; a tie counts half. Pairs of which an answer
    has no score are left out; empty if that leaves none.
    """
    difference = ours.unsqueeze(2) - theirs.unsqueeze(1)
    told = difference.flatten(1).isfinite().any(1)
    if not bool(told.any()):
        return {}
    difference = difference[told]
    known = difference.isfinite()
    parts = {
        "ties": (difference == 0).double(),
        "win_rate": (difference.sign().double() + 1) / 2,
        "score_difference": difference.double(),
    }
    parts = {name: values.masked_fill(~known, torch.nan) for name, values in parts.items()}
    by_prompt = {name: values.flatten(1).nanmean(1) for name, values in parts.items()}
    difference = by_prompt.pop("score_difference")
    figures = share("ties", by_prompt["ties"], seed) | share("win_rate", by_prompt["win_rate"], seed)
    return figures | with_intervals(
        {"score_difference": float(difference.mean())}, [bootstrap_interval(difference, seed)]
    )


def share(name: str, values: Tensor, seed: int) -> Figures:
    """The mean of what each prompt says [N], from 0 to 1, with its interval."""
    value = float(values.mean())
    return with_intervals({name: value}, [share_interval(value, bootstrap_interval(values, seed), len(values))])


def length_controlled_comparison(ours: Judged, theirs: Judged, measure: str, seed: int) -> Figures:
    """The win rate that would remain if both answers were of one length; each prompt counts alike (`core.win_rate`)."""
    difference = ours.measured[measure].unsqueeze(2) - theirs.measured[measure].unsqueeze(1)
    longer_by = ours.measured["length"].unsqueeze(2) - theirs.measured["length"].unsqueeze(1)
    wins, known = (difference.sign() + 1) / 2, difference.isfinite()
    prompts = torch.arange(len(difference)).view(-1, 1, 1).expand(difference.shape)[known]
    shares = (1 / known.flatten(1).sum(1).double())[prompts]
    return length_controlled_rate(wins[known], longer_by[known], shares, prompts, seed)


def length_controlled_rate(wins: Tensor, longer_by: Tensor, shares: Tensor, prompts: Tensor, seed: int) -> Figures:
    """From comparisons [M], how much each counts in its prompt, and which prompt it belongs to. Empty without any.

    Where one side wins them all, length can explain nothing.
    """
    if not len(wins):
        return {}
    places, count = prompts.unique(return_inverse=True)[1], len(prompts.unique())
    value, ends = float(wins[0]), (0.0, 0.0)
    if bool((wins != wins[0]).any()) or value == 0.5:
        value = float(length_controlled(wins, longer_by, shares))
        width = -(-len(wins) // count)
        rates = [
            length_controlled(wins, longer_by, times[:, places] * shares)
            for times in resamples(count, seed, REGRESSIONS, width)
        ]
        low, high = torch.cat(rates).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        ends = (low, high)
    return with_intervals({"length_controlled_win_rate": value}, [share_interval(value, ends, count)])
