"""Answers that scorers, or the scores of two runs, do not settle: what people should rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel.data.items import MOST, parse_unranked_responses
from keel.data.rows import Row
from keel.errors import DataError
from keel.run.read.responses import Numbers, ResponseLog
from keel.stats.ranks import mean_ranks

Column = NDArray[np.float64]


def rank_quantiles(values: Column) -> Column:
    """Where each stands among all: 0 lowest, 1 highest, equal ones at their mean; nan stays. [N] -> [N]"""
    return (mean_ranks(values) - 1) / max(np.isfinite(values).sum() - 1, 1)


def disagreement(scores: Mapping[str, Column], count: int) -> Column:
    """How far apart the scorers place each answer among all of the run, 0 to 1; nan with fewer than two. [N]"""
    if len(scores) < 2:
        return np.full(count, np.nan)
    found = np.stack([rank_quantiles(column) for column in scores.values()])  # [scorers, N]
    both = np.isfinite(found).sum(0) >= 2
    apart = np.full(count, np.nan)
    apart[both] = np.nanmax(found[:, both], axis=0) - np.nanmin(found[:, both], axis=0)
    return apart


@dataclass(frozen=True)
class Dispute:
    """Answers to one prompt, and how much there is to settle."""

    strength: float
    numbers: Numbers


def between_scorers(responses: ResponseLog, numbers: Numbers) -> list[Dispute]:
    """Among these answers, for each prompt: those on whose order two scorers say the opposite, the clearest first.

    Of two scorers a and b, the answer that a places highest above b, and the one that b places highest above a. Their
    dispute is as strong as the smaller of the two distances between them.
    """
    if len(responses.scores) < 2:
        return []
    found = [rank_quantiles(column) for column in responses.scores.values()]
    disputes = []
    for group in _groups(responses.index.prompt, numbers):
        pairs = [pair for one, other in combinations(found, 2) if (pair := _opposite(one[group], other[group]))]
        if pairs:
            chosen = list(dict.fromkeys(place for _, *pair in sorted(pairs, reverse=True) for place in pair))[:MOST]
            disputes.append(Dispute(max(pairs)[0], group[[int(place) for place in chosen]]))
    return sorted(disputes, key=lambda dispute: -dispute.strength)


def _opposite(one: Column, other: Column) -> tuple[float, int, int] | None:
    """(strength, the answer that the first scorer prefers, the one that the second does); None without a dispute."""
    apart = one - other
    if np.isfinite(apart).sum() < 2:
        return None
    first, second = int(np.nanargmax(apart)), int(np.nanargmin(apart))
    strength = min(one[first] - one[second], other[second] - other[first])
    return (float(strength), first, second) if strength > 0 else None


def _groups(prompts: NDArray[np.int64], numbers: Numbers) -> Iterator[Numbers]:
    """Numbers of each prompt that has at least two."""
    ordered = numbers[np.argsort(prompts[numbers], kind="stable")]
    borders = np.flatnonzero(np.diff(prompts[ordered])) + 1
    yield from (group for group in np.split(ordered, borders) if len(group) > 1)


def as_rows(disputes: Sequence[Sequence[tuple[ResponseLog, int]]], most: int, source: str) -> list[dict[str, Any]]:
    """Rows of `prompt, responses, source` for `keel rank`, with 2 to 9 different answers each, the first `most`."""
    found: list[dict[str, Any]] = []
    for dispute in disputes:
        if len(found) == most:
            break
        own = [responses.rows([number])[0] for responses, number in dispute]
        responses = list(dict.fromkeys(str(row.get("response", "")) for row in own))
        row = {"prompt": own[0].get("prompt"), "responses": responses, "source": source}
        try:
            parse_unranked_responses(Row(0, row), source)
        except DataError:  # one answer given twice, or no prompt to rank answers to
            continue
        found.append(row)
    return found
