"""Test each metric of today's responses against the training, and derive the verdict on the reward models."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from keel.stats.two_samples import (
    Numbers,
    Rows,
    detectable_distance,
    difference_interval,
    distances,
    holm,
    required_rows,
    superiority,
)

Table = Mapping[str, Numbers]  # metric -> [N], one value for each response
ShiftVerdict = Literal["moved", "moved a little", "same", "too few to say"]
ModelVerdict = Literal["applies", "in doubt", "does not apply", "too few to say"]

LEVEL = 0.05  # probability of any false alarm among all tests
NOTABLE = 0.2  # smallest distance that is worth acting on
NOTABLE_SHARES = {"outside_range/": 0.05, "truncated": 0.05, "prompt_unlikely": 0.1, "prompt_novelty": 0.1}
"""Smallest difference that is worth acting on, of the metrics that are shares."""
SCORER_METRICS = ("outside_range/", "disagreement/")  # they rise on texts that the reward model was not trained for
PROMPT = ("prompt_novelty", "prompt_unlikely")  # they rise where prompts differ from those of the training
SCORES = ("score", "rewards/")
GROUNDS = (*PROMPT, *SCORES)  # a notable shift of these makes the verdict "in doubt"
MAX_REASONS = 3  # reasons of a verdict that are listed
UNLIKELY = 0.01  # quantile of the training prompts' log-probabilities


@dataclass(frozen=True)
class MetricShift:
    """One metric on both sides, and its test."""

    training: float  # mean
    today: float  # mean
    low: float  # 95% interval of today - training
    high: float
    distance: float  # Kolmogorov-Smirnov
    superiority: float  # share of pairs in which today's value is above that of the training
    p: float  # of the permutation test, not corrected for multiple tests
    rows: Rows


def compare_metrics(training: Table, today: Table, seed: int) -> dict[str, MetricShift]:
    """Test every metric that both sides have."""
    names = [name for name in today if name in training]
    old, new = (np.stack([side[name] for name in names], 1) for side in (training, today))
    distance, p = distances(old, new, seed)
    shifts = {}
    for column, name in enumerate(names):
        old_values, new_values = old[:, column], new[:, column]
        if not np.isfinite(old_values).any() or not np.isfinite(new_values).any():
            continue
        low, high = difference_interval(old_values, new_values, seed)
        shifts[name] = MetricShift(
            training=float(np.nanmean(old_values)),
            today=float(np.nanmean(new_values)),
            low=low,
            high=high,
            distance=float(distance[column]),
            superiority=superiority(old_values, new_values),
            p=float(p[column]),
            rows=Rows.from_samples(old_values, new_values),
        )
    return shifts


def correct_p_values(groups: Mapping[str, Mapping[str, MetricShift]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Correct the p-values for all tests of all groups (Holm), and classify each shift.

    Returns the fields of each shift by group and metric, with three more. `says` is its class. `least` is the smallest
    distance that so many responses show in four of five samples, at the level of the smallest p-value. `takes`, where
    there are too few responses, is the number of today's responses that would show a notable shift (None: no number).
    """
    tests = [(group, name) for group, shifts in groups.items() for name in shifts]
    p_values = dict(zip(tests, holm([groups[group][name].p for group, name in tests]), strict=True))
    result: dict[str, dict[str, dict[str, Any]]] = {group: {} for group in groups}
    for group, name in tests:
        shift, p = groups[group][name], p_values[group, name]
        level = LEVEL / len(tests)
        least = detectable_distance(shift.rows, level)
        fields = {field: value for field, value in asdict(shift).items() if field != "rows"}
        result[group][name] = fields | {"p": p, "least": least, "says": classify_shift(name, shift, p, least)}
        if result[group][name]["says"] == "too few to say":
            result[group][name]["takes"] = required_rows(shift.rows, level, notable(name))
    return result


def mark_unlikely(logprobs: Numbers, of_training: Numbers) -> Numbers:
    """Mark prompts that are less likely under the reference than 99% of the training prompts. NaN stays. [N] -> [N]"""
    known = of_training[np.isfinite(of_training)]
    limit = np.quantile(known, UNLIKELY) if len(known) else np.nan
    return np.where(np.isfinite(logprobs), logprobs < limit, np.nan)


def classify_shift(name: str, shift: MetricShift, p: float, least: float) -> ShiftVerdict:
    """Classify a shift.

    "moved": significant and large enough to act on. "moved a little": significant but small. "same": not significant,
    with enough responses to detect a notable shift. "too few to say": not significant, with too few responses.
    """
    share = notable_share(name)
    if p <= LEVEL:
        is_notable = shift.distance >= NOTABLE if share is None else abs(shift.today - shift.training) >= share
        return "moved" if is_notable else "moved a little"
    return "same" if least <= notable(name) else "too few to say"


def notable_share(name: str) -> float | None:
    return next((bound for start, bound in NOTABLE_SHARES.items() if name.startswith(start)), None)


def notable(name: str) -> float:
    """Return the smallest distance of a metric that is worth acting on."""
    share = notable_share(name)
    # The distance of a yes-or-no metric is the difference of the shares. `prompt_novelty` is a share within a prompt.
    return NOTABLE if share is None or name == "prompt_novelty" else share


def model_verdict(metrics: Mapping[str, Mapping[str, Any]]) -> ModelVerdict:
    """Return the verdict on the reward models: whether their scores of these responses can be trusted."""
    scorer_shifts = {name: shift for name, shift in metrics.items() if name.startswith(SCORER_METRICS)}
    grounds = {name: shift for name, shift in metrics.items() if name.startswith(GROUNDS)}
    if any(is_alarming(name, shift) for name, shift in scorer_shifts.items()):
        return "does not apply"
    if any(is_alarming(name, shift) for name, shift in grounds.items()):
        return "in doubt"
    return "too few to say" if not grounds or undecided_metrics(metrics) else "applies"


def undecided_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the metrics of the verdict that have too few responses, the one that needs most first."""
    relevant = {name: each for name, each in metrics.items() if name.startswith((*SCORER_METRICS, *GROUNDS))}
    few = {name: each.get("takes") for name, each in relevant.items() if each["says"] == "too few to say"}
    return sorted(few, key=lambda name: -(few[name] or math.inf))


def explain_too_few(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Explain the verdict "too few to say": which metric needs how many responses."""
    names = undecided_metrics(metrics)
    if not names:
        return ["neither scores nor prompts were measured"]
    takes = metrics[names[0]].get("takes")
    least = f"a move of {notable(names[0]):g} in {names[0]}"
    others = f" (also too few for {', '.join(names[1:])})" if names[1:] else ""
    if takes is None:
        return [f"no number of responses would show {least}{others}"]
    return [f"it takes about {round_up_estimate(takes)} responses on each side to show {least}{others}"]


def round_up_estimate(count: int) -> int:
    """Round up to two digits."""
    unit = 10 ** max(1, len(str(count)) - 2)
    return -(-count // unit) * unit


def is_alarming(name: str, shift: Mapping[str, Any]) -> bool:
    """Whether a shift is evidence against the reward model: a rise, or for scores a shift in either direction."""
    return shift["says"] == "moved" and (name.startswith(SCORES) or shift["today"] > shift["training"])


def comparable_metrics(table: Table) -> Table:
    """Select the metrics in which a slice can be compared with all of the training.

    Scores are left out: those of one kind of prompt may differ from those of all kinds without any drift.
    """
    return {name: values for name, values in table.items() if name.startswith((*SCORER_METRICS, *PROMPT))}


def format_p_value(p: float) -> str:
    """Format a p-value."""
    return f"{p:.2g}" if p >= 1e-3 else "<0.001"


def describe_shifts(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe the metrics that moved, one line each; of many, the first three.

    Evidence against the reward model comes first, then scores and prompts, then the rest, by falling distance.
    """

    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[int, float]:
        name, shift = item
        kinds = (number for number, start in enumerate((SCORER_METRICS, GROUNDS)) if name.startswith(start))
        return next(kinds, 2) if is_alarming(name, shift) else 2, -shift["distance"]

    moved = [(name, shift) for name, shift in metrics.items() if shift["says"] == "moved"]
    lines = [
        f"{name}: {shift['training']:.3g} in the training, {shift['today']:.3g} today"
        f" (distance {shift['distance']:.2f}, p {format_p_value(shift['p'])})"
        for name, shift in sorted(moved, key=order)
    ]
    return lines if len(lines) <= MAX_REASONS + 1 else [*lines[:MAX_REASONS], f"and {len(lines) - MAX_REASONS} more"]
