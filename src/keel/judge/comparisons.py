"""Compare and rank the responses to one prompt with a judge, without an advantage for a place in the question."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from keel.data.messages import Content
from keel.judge.judge import Judge, NoVerdict


@dataclass(frozen=True)
class Group:
    """The responses to one prompt."""

    prompt: Content
    responses: tuple[str, ...]

    @property
    def distinct(self) -> list[str]:
        """The different texts, in an order that depends on the texts alone: no place in the group has an advantage."""
        texts = sorted(set(self.responses))
        content = json.dumps([self.prompt, texts], sort_keys=True)
        random.Random(hashlib.sha256(content.encode()).hexdigest()).shuffle(texts)
        return texts


def rank_groups(judge: Judge, groups: Sequence[Group]) -> list[list[int] | NoVerdict]:
    """Ask for one ranking of each group. Return the ranks of its responses: 1 is best, equal texts are a tie.

    Raises RewardError if the judge cannot be asked.
    """
    orders = [group.distinct for group in groups]
    asked = [index for index, texts in enumerate(orders) if len(texts) > 1]
    verdicts = judge.ask([judge.writer.rank(groups[index].prompt, orders[index]) for index in asked])
    by_group: dict[int, Any] = dict(zip(asked, verdicts, strict=True))
    results: list[list[int] | NoVerdict] = []
    for index, (group, texts) in enumerate(zip(groups, orders, strict=True)):
        ranks = by_group.get(index, [1])
        if not isinstance(ranks, NoVerdict):
            rank = dict(zip(texts, ranks, strict=True))
            ranks = [rank[response] for response in group.responses]
        results.append(ranks)
    return results


def compare_groups(judge: Judge, groups: Sequence[Group]) -> list[list[list[float | NoVerdict]]]:
    """Compare all pairs of responses of each group, in both orders, since judges prefer a place.

    Returns for each group the result [n, n] of each response against each other one: 1 won, 0 lost, and 1/2 for a tie
    or for orders that contradict each other. Equal texts are a tie, and the diagonal is 1/2.

    Raises RewardError if the judge cannot be asked.
    """
    pairs = [(index, pair) for index, group in enumerate(groups) for pair in permutations(group.distinct, 2)]
    verdicts = judge.ask([judge.writer.compare(groups[index].prompt, *pair) for index, pair in pairs])
    first_wins: dict[Any, Any] = dict(zip(pairs, verdicts, strict=True))

    def result(index: int, one: str, other: str) -> float | NoVerdict:
        if one == other:
            return 0.5
        forward, backward = first_wins[index, (one, other)], first_wins[index, (other, one)]
        failed = next((each for each in (forward, backward) if isinstance(each, NoVerdict)), None)
        if failed is not None:
            return failed
        return float(forward) if forward == 1 - backward else 0.5

    return [
        [[result(index, one, other) for other in group.responses] for one in group.responses]
        for index, group in enumerate(groups)
    ]


def results_from_ranks(ranks: Sequence[int]) -> list[list[float]]:
    """Return the result [n, n] of each response against each other one: 1 better, 0 worse, 1/2 the same rank."""
    return [[0.5 + 0.5 * ((one < other) - (one > other)) for other in ranks] for one in ranks]


def win_rates(results: Sequence[Sequence[float | NoVerdict]]) -> list[float | NoVerdict]:
    """Return the mean result of each response against the others; a missing result leaves it without one.

    Args:
        results: [n, n], n >= 2, as `compare_groups` returns them.
    """
    rates: list[float | NoVerdict] = []
    for index, row in enumerate(results):
        others = [result for place, result in enumerate(row) if place != index]
        failed = next((each for each in others if isinstance(each, NoVerdict)), None)
        numbers = [each for each in others if not isinstance(each, NoVerdict)]
        rates.append(failed or sum(numbers) / len(numbers))
    return rates
