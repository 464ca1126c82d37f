"""Score each distinct prompt and response once, for all batches and all policies.

The last bits of a reward model's score depend on the batch around the text. If identical responses were scored twice,
they would win or lose against each other by rounding.
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
    """Wrap each scorer in ScoredOnce, unless it is declared noisy."""
    return [scorer if scorer.noisy else ScoredOnce(scorer) for scorer in scorers]


class ScoredOnce:
    """A scorer that keeps all its scores, and passes only new samples to the wrapped scorer."""

    noisy = False

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.name, self.weight = scorer, scorer.name, scorer.weight
        self.known: dict[str, tuple[Score, float | None, bool | None]] = {}  # score, disagreement, cut
        self.disagreement: list[float] | None = None  # of an ensemble, for each response of the last call
        self.cut: list[bool] | None = None  # whether each text of the last call was too long for a reward model

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        keys = self.keys(rollouts, segments)
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self.known}
        new = sorted(first.values())
        if new:
            new_segments = None if segments is None else [segments[row] for row in new]
            scores = self.scorer(select_rows(rollouts, new), new_segments)
            blank = [None] * len(new)
            spread = getattr(self.scorer, "disagreement", None) or blank
            cut = getattr(self.scorer, "cut", None) or blank
            self.known |= dict(zip((keys[row] for row in new), zip(scores, spread, cut, strict=True), strict=True))
        results = [self.known[key] for key in keys]
        self.disagreement = all_or_none([spread for _, spread, _ in results])
        self.cut = all_or_none([cut for _, _, cut in results])
        return [score for score, _, _ in results]

    def keys(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[str]:
        """Return everything that the scorer reads of each sample, as JSON.

        Token ids are part of the key only for a function that has a parameter for them, since one text has many
        tokenizations.
        """
        if isinstance(self.scorer, HttpScorer):
            prompts: list[Any] = [prompt.text for prompt in rollouts.prompts]  # as the policy's template renders them
        else:
            prompts = [prompt.content for prompt in rollouts.prompts]
        tools = [prompt.columns.get("tools") for prompt in rollouts.prompts]
        read: list[Any] = [prompts, rollouts.texts, segments or prompts, rollouts.truncated.tolist(), tools]
        if isinstance(self.scorer, FunctionScorer):
            arguments = function_arguments(rollouts, columns=self.scorer.columns)
            takes = self.scorer.takes
            names = [
                name for name in arguments if name in takes or (self.scorer.takes_all and name != "completion_ids")
            ]
            read += [arguments[name] for name in names]
        return [json.dumps(sample, default=repr) for sample in zip(*read, strict=True)]


def all_or_none(values: Sequence[ValueT | None]) -> list[ValueT] | None:
    """Return the values, or None if one of them is missing."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
