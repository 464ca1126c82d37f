"""Rollouts -> ScoredRollouts: call every scorer, and add up the scores by their weights."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel.core.rewards import place_scores
from keel.data.batches import Rollouts, ScoredRollouts
from keel.data.turns import common_prefix_length
from keel.errors import RewardError
from keel.rollout.function_scorer import FunctionScorer
from keel.rollout.sampler import continuation
from keel.rollout.score_check import NoScore, Score
from keel.rollout.scorers import Scorer
from keel.rollout.segments import split_segments
from keel.world import ALONE, World, raise_together


def score(
    rollouts: Rollouts,
    scorers: Sequence[Scorer],
    tokenizer: PreTrainedTokenizerBase,
    segments: str = "none",
    on_failure: str = "stop",
    world: World = ALONE,
) -> ScoredRollouts:
    """Score a batch of responses with every scorer.

    Args:
        world: processes that call this together, each with its responses. An error of one is raised on all, before the
            next scorer: a sharded reward model needs all processes.
        segments: "none", "sentence", or a delimiter. The score of a segment is on the segment's last token.
        on_failure: "stop" raises RewardError if a scorer fails; "drop" only drops the responses that it failed on.

    Raises RewardError also for a response that no scorer has a score for.
    """
    texts = None if segments == "none" else [split_segments(text, segments) for text in rollouts.texts]
    device = rollouts.response_mask.device
    total = torch.zeros(rollouts.response_mask.shape, device=device)
    has_score = torch.zeros(len(rollouts.texts), dtype=torch.bool, device=device)
    failed = torch.zeros_like(has_score)
    by_scorer: dict[str, Tensor] = {}
    disagreement, cut, failures = dict[str, Tensor](), dict[str, Tensor](), dict[str, str]()
    segmented = texts is not None
    for scorer in scorers:
        called = raise_together(world, partial(_call_scorer, scorer, rollouts, texts, on_failure, tokenizer))
        scores, token_scores, lost, cause = called
        failed |= torch.tensor(lost, dtype=torch.bool, device=device)
        failures |= {scorer.name: cause} if cause else {}
        segmented = segmented or any(isinstance(value, list) for value in scores)
        scored_here = torch.tensor([value is not None for value in scores], dtype=torch.bool, device=device)
        token_scores = token_scores.to(device)
        total += scorer.weight * token_scores
        has_score |= scored_here
        by_scorer[scorer.name] = token_scores.sum(1).masked_fill(~scored_here, torch.nan)
        if (spread := getattr(scorer, "disagreement", None)) is not None:
            disagreement[scorer.name] = torch.tensor(spread, device=device)
        if (limited := getattr(scorer, "cut", None)) is not None:
            cut[scorer.name] = torch.tensor(limited, dtype=torch.bool, device=device)
    if not bool((has_score | failed).all()):
        row = int((~has_score & ~failed).nonzero()[0])
        raise RewardError(f"no scorer had a score for sample {row} ({rollouts.texts[row][:60]!r})", where="rewards")
    segment_scores, kept = total if segmented else None, ~failed
    scored = ScoredRollouts(rollouts, total.sum(1), segment_scores, by_scorer, kept, disagreement, cut, failures)
    return _add_logged(scored, scorers)


def _add_logged(scored: ScoredRollouts, scorers: Sequence[Scorer]) -> ScoredRollouts:
    """Add what the reward functions logged about this batch. Metrics with the same name are joined."""
    functions = [scorer for scorer in scorers if isinstance(scorer, FunctionScorer)]
    metrics: dict[str, list[float]] = {}
    for scorer in functions:
        for name, values in scorer.logged.metrics.items():
            metrics[name] = metrics.get(name, []) + values
    columns = {name: values for scorer in functions for name, values in scorer.logged.columns.items()}
    return replace(scored, logged=metrics, columns=columns)


def _call_scorer(
    scorer: Scorer,
    rollouts: Rollouts,
    segments: list[list[str]] | None,
    on_failure: str,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Score], Tensor, list[bool], str]:
    """Call a scorer on all responses.

    Returns its scores, None where it failed; the scores on their tokens [B, T]; which responses it failed on; and the
    cause of the first failure.
    """
    try:
        scores = scorer(rollouts, segments)
    except RewardError as error:
        if on_failure == "stop":
            raise
        nothing = torch.zeros(rollouts.response_mask.shape)
        return [None] * len(rollouts.texts), nothing, [True] * len(rollouts.texts), str(error)
    causes = [
        RewardError(f"{value.reason}: sample {row} ({rollouts.texts[row][:60]!r})", where=scorer.name)
        for row, value in enumerate(scores)
        if isinstance(value, NoScore)
    ]
    if causes and on_failure == "stop":
        raise causes[0]
    lost = [isinstance(value, NoScore) for value in scores]
    valid: list[Score] = [None if isinstance(value, NoScore) else value for value in scores]
    token_scores = _place_on_tokens(valid, rollouts, segments, tokenizer, scorer.name)
    return valid, token_scores, lost, str(causes[0]) if causes else ""


def _place_on_tokens(
    scores: list[Score],
    rollouts: Rollouts,
    segments: list[list[str]] | None,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Tensor:
    """Put each score on the last token of the response or segment that it is for. -> [B, T], on the CPU"""
    mask = rollouts.response_mask.cpu()
    token_scores = place_scores(torch.tensor([value if isinstance(value, float) else 0.0 for value in scores]), mask)
    for row, value in enumerate(scores):
        if isinstance(value, list):
            texts, numbers = _segment_scores(value, row, rollouts, segments, name)
            for place, number in zip(token_ends(rollouts, row, texts, tokenizer), numbers, strict=True):
                token_scores[row, place] += number
    return token_scores


def _segment_scores(
    score: list[Any], row: int, rollouts: Rollouts, segments: list[list[str]] | None, name: str
) -> tuple[list[str], list[float]]:
    """Return the texts and scores of a response's segments.

    A scorer returns a number for each segment that it was called with, or (text, score) pairs of other segments.
    """
    if score and isinstance(score[0], tuple):
        texts, numbers = [text for text, _ in score], [number for _, number in score]
        if "".join(texts) != rollouts.texts[row]:
            raise RewardError(f"the segments of sample {row} do not join to its response", where=name)
        return texts, numbers
    if segments is None:
        raise RewardError(
            f"sample {row} got a list of rewards", where=name, fix="set reward.segments, or return (text, reward) pairs"
        )
    if len(score) != len(segments[row]):
        raise RewardError(f"sample {row} has {len(segments[row])} segments, got {len(score)} rewards", where=name)
    return segments[row], score


def token_ends(rollouts: Rollouts, row: int, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the index of the token that completes each segment. The last segment ends with the response.

    A character of several tokens is complete with its last token. Until then, it decodes to something else.
    """
    tokens = rollouts.response_tokens[row][rollouts.response_mask[row]].tolist()
    prompt = rollouts.prompts[row].tokens
    decoded = [continuation(tokenizer, prompt, tokens[: t + 1]) for t in range(len(tokens))]
    reached = [common_prefix_length(text, decoded[-1]) for text in decoded]
    ends, length = [], 0
    for text in texts[:-1]:
        length += len(text.rstrip())
        ends.append(next((t for t, size in enumerate(reached) if size >= length), len(tokens) - 1))
        length += len(text) - len(text.rstrip())
    return [*ends, len(tokens) - 1]
