"""One score for each distinct prompt and response, in whatever batches and of whatever policy it comes.

A reward model's score of a text depends in the last bits on the batch around it. Scored twice, two identical responses
would win or lose against each other by rounding.
"""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from keel.data.batches import Rollouts, select_rows
from keel.rollout.function_scorer import FunctionScorer, function_arguments
from keel.rollout.http_scorer import HttpScorer
from keel.rollout.score_check import Score
from keel.rollout.scorers import Scorer

ValueT = TypeVar("ValueT")


def scored_once(scorers: Sequence[Scorer]) -> list[Scorer]:
    """Wrap every scorer that is not declared noisy."""
    return [scorer if scorer.noisy else ScoredOnce(scorer) for scorer in scorers]


class ScoredOnce:
    """A scorer that remembers the score of everything it has seen, and asks only for what is new."""

    noisy = False

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.name, self.weight = scorer, scorer.name, scorer.weight
        self.known: dict[str, tuple[Score, float | None, bool | None]] = {}  # score, disagreement, cut
        self.disagreement: list[float] | None = None  # of an ensemble over each response of the last call
        self.cut: list[bool] | None = None  # whether a reward model read all of each text of the last call

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        keys = self.keys(rollouts, segments)
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self.known}
        new = sorted(first.values())
        if new:
            parts = None if segments is None else [segments[row] for row in new]
            scores = self.scorer(select_rows(rollouts, new), parts)
            blank = [None] * len(new)
            spread = getattr(self.scorer, "disagreement", None) or blank
            cut = getattr(self.scorer, "cut", None) or blank
            self.known |= dict(zip((keys[row] for row in new), zip(scores, spread, cut, strict=True), strict=True))
        found = [self.known[key] for key in keys]
        self.disagreement = complete([spread for _, spread, _ in found])
        self.cut = complete([cut for _, _, cut in found])
        return [score for score, _, _ in found]

    def keys(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[str]:
        """Everything that the scorer reads of each sample, as JSON.

        Token ids count only for a function that names them: one text has many tokenizations.
        """
        if isinstance(self.scorer, HttpScorer):
            prompts: list[Any] = [prompt.text for prompt in rollouts.prompts]  # as the policy's template renders them
        else:
            prompts = [prompt.content for prompt in rollouts.prompts]
        tools = [prompt.columns.get("tools") for prompt in rollouts.prompts]
        read: list[Any] = [prompts, rollouts.texts, segments or prompts, rollouts.truncated.tolist(), tools]
        if isinstance(self.scorer, FunctionScorer):
            given = function_arguments(rollouts, columns=self.scorer.columns)
            takes = self.scorer.takes
            names = [name for name in given if name in takes or (self.scorer.takes_all and name != "completion_ids")]
            read += [given[name] for name in names]
        return [json.dumps(sample, default=repr) for sample in zip(*read, strict=True)]


def complete(values: Sequence[ValueT | None]) -> list[ValueT] | None:
    """The values, None where one is missing."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
