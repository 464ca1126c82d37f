"""Responses whose order the scorers, or the scores of two runs, leave open. People should rank these."""

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
    """Return the quantile of each value among all: 0 lowest, 1 highest, ties share their mean. NaN stays. [N] -> [N]"""
    return (mean_ranks(values) - 1) / max(np.isfinite(values).sum() - 1, 1)


def scorer_disagreement(scores: Mapping[str, Column], count: int) -> Column:
    """Return for each response the range of its quantiles over the scorers.

    Args:
        scores: Scorer -> scores [N]. A quantile is among all responses of the run.
        count: N, for the case without scorers.

    Returns:
        [N] from 0 to 1; NaN for a response with fewer than two scores.
    """
    if len(scores) < 2:
        return np.full(count, np.nan)
    quantiles = np.stack([rank_quantiles(column) for column in scores.values()])  # [scorers, N]
    has_two = np.isfinite(quantiles).sum(0) >= 2
    spread = np.full(count, np.nan)
    spread[has_two] = np.nanmax(quantiles[:, has_two], axis=0) - np.nanmin(quantiles[:, has_two], axis=0)
    return spread


@dataclass(frozen=True)
class Dispute:
    """Responses to one prompt whose order is open."""

    strength: float  # larger is clearer
    numbers: Numbers  # indices into the response log, or one for each of two logs


def disputes_between_scorers(responses: ResponseLog, numbers: Numbers) -> list[Dispute]:
    """Find responses to one prompt that two scorers order in opposite ways, the clearest first.

    For two scorers a and b, take the response whose quantile under a is highest above that under b, and the response
    for which it is lowest. The strength of the dispute is the smaller of the two scorers' quantile differences.

    Args:
        responses: The responses of a run.
        numbers: Indices of the responses to search.
    """
    if len(responses.scores) < 2:
        return []
    quantiles = [rank_quantiles(column) for column in responses.scores.values()]
    disputes = []
    for group in _prompt_groups(responses.index.prompt, numbers):
        pairs = [
            pair for one, other in combinations(quantiles, 2) if (pair := _opposite_pair(one[group], other[group]))
        ]
        if pairs:
            chosen = list(dict.fromkeys(index for _, *pair in sorted(pairs, reverse=True) for index in pair))[:MOST]
            disputes.append(Dispute(max(pairs)[0], group[[int(index) for index in chosen]]))
    return sorted(disputes, key=lambda dispute: -dispute.strength)


def _opposite_pair(one: Column, other: Column) -> tuple[float, int, int] | None:
    """Return (strength, response that the first scorer prefers, response that the second one prefers), or None."""
    difference = one - other
    if np.isfinite(difference).sum() < 2:
        return None
    first, second = int(np.nanargmax(difference)), int(np.nanargmin(difference))
    strength = min(one[first] - one[second], other[second] - other[first])
    return (float(strength), first, second) if strength > 0 else None


def _prompt_groups(prompts: NDArray[np.int64], numbers: Numbers) -> Iterator[Numbers]:
    """Yield the indices of the responses to each prompt that has at least two."""
    ordered = numbers[np.argsort(prompts[numbers], kind="stable")]
    borders = np.flatnonzero(np.diff(prompts[ordered])) + 1
    yield from (group for group in np.split(ordered, borders) if len(group) > 1)


def unranked_rows(
    disputes: Sequence[Sequence[tuple[ResponseLog, int]]], limit: int, source: str
) -> list[dict[str, Any]]:
    """Return the first disputes as rows of `prompt, responses, source` for `keel rank`.

    A row has 2 to 9 different responses. Disputes whose responses have the same text are skipped.
    """
    rows: list[dict[str, Any]] = []
    for dispute in disputes:
        if len(rows) == limit:
            break
        logged = [responses.rows([number])[0] for responses, number in dispute]
        texts = list(dict.fromkeys(str(row.get("response", "")) for row in logged))
        row = {"prompt": logged[0].get("prompt"), "responses": texts, "source": source}
        try:
            parse_unranked_responses(Row(0, row), source)
        except DataError:  # fewer than two different responses, or no prompt
            continue
        rows.append(row)
    return rows
