"""How good a reward model is on prompts it was not trained on, beside what length alone would say."""

import math
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from keel.core.preferences import bradley_terry_loss
from keel.data.preferences import Ranking

NUM_BINS = 10


def judge(scores: Sequence[Tensor], held_out: Sequence[Ranking]) -> dict[str, float]:
    """Figures over all pairs of answers that were told apart.

    Each ranking counts once, shared among its pairs. `scores` has one tensor [K] for each ranking, in the order of its
    responses. accuracy: pairs in the right order, equal scores counting half. loss: Bradley-Terry, in nats.
    """
    differences, weights = differences_of(scores, held_out)
    return {
        "accuracy": mean_accuracy(differences, weights),
        "loss": float(weights @ bradley_terry_loss(differences, torch.zeros_like(differences))),
        "calibration_error": calibration_error(differences, weights),
    }


def baselines(held_out: Sequence[Ranking], train: Sequence[Ranking]) -> dict[str, float]:
    """The same figures for scorers that read nothing; empty without held-out rankings.

    length: the number of characters, or its negative where shorter answers win more often in `train` (length_sign).
    constant: the same score for all answers.
    """
    if not held_out:
        return {}
    sign = 1.0 if mean_accuracy(*differences_of(list(map(lengths, train)), train)) >= 0.5 else -1.0
    differences, weights = differences_of(list(map(lengths, held_out)), held_out)
    return {
        "length_accuracy": mean_accuracy(sign * differences, weights),
        "length_sign": sign,
        "constant_accuracy": 0.5,
        "constant_loss": math.log(2),
    }


def differences_of(scores: Sequence[Tensor], rankings: Sequence[Ranking]) -> tuple[Tensor, Tensor]:
    """Score of the better minus score of the worse answer, and weights that sum to 1, of all pairs. -> [M], [M]"""
    differences, weights = [], []
    for values, ranking in zip(scores, rankings, strict=True):
        better, worse = torch.tensor(ranking.pairs).unbind(1)
        differences.append(values[better].double() - values[worse].double())
        weights.append(torch.full_like(differences[-1], 1 / (len(better) * len(rankings))))
    return torch.cat(differences), torch.cat(weights)


def lengths(ranking: Ranking) -> Tensor:
    """Characters of each response. -> [K]"""
    return torch.tensor([float(len(response)) for response in ranking.responses])


def mean_accuracy(differences: Tensor, weights: Tensor) -> float:
    return float(weights @ ((differences > 0) + 0.5 * (differences == 0)).double())


def calibration_error(differences: Tensor, weights: Tensor) -> float:
    """Expected calibration error: mean over pairs of |accuracy - confidence| of the pair's bin.

    The model says that the answer it prefers is the better one with probability sigma(|difference|), between 0.5 and 1
    in NUM_BINS equal bins. Either order of a pair says the same, so one is looked at. Naeini et al. 2015.
    """
    confidence = differences.abs().sigmoid()
    gap = weights * ((differences > 0) + 0.5 * (differences == 0) - confidence)
    bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    return float(torch.zeros(NUM_BINS, dtype=gap.dtype).index_add(0, bins, gap).abs().sum())


def print_figures(figures: Mapping[str, float]) -> None:
    """What `reward` returns as a small table: the reward model, length alone, a constant; if anything was held out."""
    if "accuracy" not in figures:
        return
    prefers = "longer" if figures["length_sign"] > 0 else "shorter"
    table = Table("on held-out prompts", "accuracy", "loss", "calibration error")
    rows = {"reward model": "", f"length alone ({prefers} is better)": "length_", "constant": "constant_"}
    for title, prefix in rows.items():
        cells = (figures.get(prefix + name) for name in ("accuracy", "loss", "calibration_error"))
        table.add_row(title, *("" if value is None else f"{value:.3f}" for value in cells))
    Console().print(table)
    if figures["prompts_on_both_sides"]:
        print(
            f"{figures['prompts_on_both_sides']:.0f} held-out prompts are among those learned from: a flattering figure"
        )
