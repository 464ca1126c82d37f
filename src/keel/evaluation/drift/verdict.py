"""Whether today's answers are like those of the training: each figure tested, and what that says of the judges."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from keel.stats.two_samples import (
    Numbers,
    Rows,
    detectable,
    difference_interval,
    distances,
    holm,
    required_rows,
    superiority,
)

Table = Mapping[str, Numbers]  # figure -> a value for each answer
ShiftVerdict = Literal["moved", "moved a little", "same", "too few to say"]
Standing = Literal["applies", "in doubt", "does not apply", "too few to say"]

LEVEL = 0.05  # chance of any false alarm among all tests
NOTABLE = 0.2  # a smaller distance is not worth acting on
NOTABLE_SHARES = {"outside_range/": 0.05, "truncated": 0.05, "prompt_unlikely": 0.1, "prompt_novelty": 0.1}
"""Of these figures, which are shares, the difference that is worth acting on."""
SCORER_METRICS = (
    "outside_range/",
    "disagreement/",
)  # rising, they say that a reward model is asked what it does not know
PROMPT = ("prompt_novelty", "prompt_unlikely")  # rising, they say that prompts are stranger than those of the training
SCORES = ("score", "rewards/")  # moved, they say that the answers are judged otherwise than in the training
GROUNDS = (*PROMPT, *SCORES)
MAX_REASONS = 3  # reasons for a verdict
UNLIKELY = 0.01  # of the training prompts are as unlikely


@dataclass(frozen=True)
class MetricShift:
    """One figure, then and today."""

    training: float
    today: float
    low: float  # 95% interval of today - training
    high: float
    distance: float  # Kolmogorov-Smirnov
    superiority: float  # how often a value of today is above one of the training
    p: float  # of the permutation test; corrected for all tests of the call once `correct_p_values` has been there
    rows: Rows


def compare_metrics(training: Table, today: Table, seed: int) -> dict[str, MetricShift]:
    """Every figure that both sides have."""
    names = [name for name in today if name in training]
    old, new = (np.stack([side[name] for name in names], 1) for side in (training, today))
    apart, p = distances(old, new, seed)
    found = {}
    for column, name in enumerate(names):
        before, now = old[:, column], new[:, column]
        if not np.isfinite(before).any() or not np.isfinite(now).any():
            continue
        low, high = difference_interval(before, now, seed)
        means = float(np.nanmean(before)), float(np.nanmean(now))
        metrics = float(apart[column]), superiority(before, now), float(p[column])
        found[name] = MetricShift(*means, low, high, *metrics, Rows.from_samples(before, now))
    return found


def correct_p_values(groups: Mapping[str, Mapping[str, MetricShift]]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each group and figure its numbers, the p-value corrected for all tests (Holm), and what it says.

    `least` is the distance that so many answers would have shown in four of five samples, at the level that the
    smallest of all p-values is held to; `takes` is how many of today would show what is worth acting on, where there
    are too few (None: no number would).
    """
    places = [(group, name) for group, found in groups.items() for name in found]
    p_values = dict(zip(places, holm([groups[group][name].p for group, name in places]), strict=True))
    result: dict[str, dict[str, dict[str, Any]]] = {group: {} for group in groups}
    for group, name in places:
        moved, p = groups[group][name], p_values[group, name]
        level = LEVEL / len(places)
        least = detectable(moved.rows, level)
        metrics = {metric: value for metric, value in asdict(moved).items() if metric != "rows"}
        result[group][name] = metrics | {"p": p, "least": least, "says": classify_shift(name, moved, p, least)}
        if result[group][name]["says"] == "too few to say":
            result[group][name]["takes"] = required_rows(moved.rows, level, notable(name))
    return result


def unlikely(logprobs: Numbers, of_training: Numbers) -> Numbers:
    """1 for a prompt that the reference finds less likely than 99 of 100 training prompts; nan where it has no word."""
    known = of_training[np.isfinite(of_training)]
    limit = np.quantile(known, UNLIKELY) if len(known) else np.nan
    return np.where(np.isfinite(logprobs), logprobs < limit, np.nan)


def classify_shift(name: str, moved: MetricShift, p: float, least: float) -> ShiftVerdict:
    """Moved: chance would seldom do it, and it is worth acting on. The same: so many answers would have shown it."""
    share = notable_share(name)
    if p <= LEVEL:
        far = moved.distance >= NOTABLE if share is None else abs(moved.today - moved.training) >= share
        return "moved" if far else "moved a little"
    return "same" if least <= notable(name) else "too few to say"


def notable_share(name: str) -> float | None:
    return next((bound for start, bound in NOTABLE_SHARES.items() if name.startswith(start)), None)


def notable(name: str) -> float:
    """The distance that so many answers have to show."""
    share = notable_share(name)
    return NOTABLE if share is None or name == "prompt_novelty" else share  # the one share that is no yes or no


def standing(metrics: Mapping[str, Mapping[str, Any]]) -> Standing:
    """What the figures say of the reward models: whether what they say of these answers can be believed."""
    judge = {name: found for name, found in metrics.items() if name.startswith(SCORER_METRICS)}
    grounds = {name: found for name, found in metrics.items() if name.startswith(GROUNDS)}
    if any(alarms(name, found) for name, found in judge.items()):
        return "does not apply"
    if any(alarms(name, found) for name, found in grounds.items()):
        return "in doubt"
    return "too few to say" if not grounds or blocking(metrics) else "applies"


def blocking(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of the figures that a verdict rests on those that take more answers, the one that takes most first."""
    found = {name: each for name, each in metrics.items() if name.startswith((*SCORER_METRICS, *GROUNDS))}
    few = {name: each.get("takes") for name, each in found.items() if each["says"] == "too few to say"}
    return sorted(few, key=lambda name: -(few[name] or math.inf))


def too_few(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why nothing can be said, and how many answers would do."""
    names = blocking(metrics)
    if not names:
        return ["no score and nothing about the prompts was measured"]
    takes = metrics[names[0]].get("takes")
    least = f"a move of {notable(names[0]):g} in {names[0]}"
    others = f" (also too few for {', '.join(names[1:])})" if names[1:] else ""
    if takes is None:
        return [f"no number of answers would show {least}{others}"]
    return [f"it takes about {round_up_estimate(takes)} answers on each side to show {least}{others}"]


def round_up_estimate(count: int) -> int:
    """To two digits, for it is an estimate."""
    unit = 10 ** max(1, len(str(count)) - 2)
    return -(-count // unit) * unit


def alarms(name: str, found: Mapping[str, Any]) -> bool:
    """Whether a figure has moved in a direction that speaks against the reward model; of a score in either."""
    return found["says"] == "moved" and (name.startswith(SCORES) or found["today"] > found["training"])


def comparable(table: Table) -> Table:
    """What a kind of prompts can be asked that the training did not tell apart: only whether it is beyond all that the
    training had. Its scores may well differ from those of all kinds together."""
    return {name: values for name, values in table.items() if name.startswith((*SCORER_METRICS, *PROMPT))}


def small(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-3 else "<0.001"


def describe_shifts(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What has moved, of many the first three: what speaks against the judge itself, then scores and prompts, then the
    rest, in each the largest distance first."""

    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[int, float]:
        name, found = item
        kinds = (at for at, start in enumerate((SCORER_METRICS, GROUNDS)) if name.startswith(start))
        return next(kinds, 2) if alarms(name, found) else 2, -found["distance"]

    moved = [(name, found) for name, found in metrics.items() if found["says"] == "moved"]
    said = [
        f"{name}: {found['training']:.3g} in the training, {found['today']:.3g} today"
        f" (distance {found['distance']:.2f}, p {small(found['p'])})"
        for name, found in sorted(moved, key=order)
    ]
    return said if len(said) <= MAX_REASONS + 1 else [*said[:MAX_REASONS], f"and {len(said) - MAX_REASONS} more"]
