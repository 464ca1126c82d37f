"""One batch of experience: prompts -> Rollouts -> ScoredRollouts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel.core.masked import last_counted_index
from keel.data.batches import Rollouts, ScoredRollouts
from keel.data.turns import common_prefix_length
from keel.errors import RewardError
from keel.rollout.functions import FunctionScorer
from keel.rollout.sampler import continuation
from keel.rollout.score_check import NoScore, Score
from keel.rollout.scorers import Scorer
from keel.rollout.segments import split


def score(
    rollouts: Rollouts,
    scorers: Sequence[Scorer],
    tokenizer: PreTrainedTokenizerBase,
    segments: str = "none",
    on_failure: str = "stop",
) -> ScoredRollouts:
    """Ask every scorer and add up what they say, by their weights.

    With `segments` (sentence, or a delimiter) each part's score stands on the part's last token.
    A failing scorer raises RewardError or, with on_failure "drop", loses its responses only.
    """
    parts = None if segments == "none" else [split(text, segments) for text in rollouts.texts]
    device = rollouts.response_mask.device
    total = torch.zeros(rollouts.response_mask.shape, device=device)
    judged = torch.zeros(len(rollouts.texts), dtype=torch.bool, device=device)
    failed = torch.zeros_like(judged)
    by_scorer: dict[str, Tensor] = {}
    disagreement, cut, failures = dict[str, Tensor](), dict[str, Tensor](), dict[str, str]()
    segmented = parts is not None
    for scorer in scorers:
        responses, lost, cause = _ask(scorer, rollouts, parts, on_failure)
        failed |= torch.tensor(lost, device=device)
        failures |= {scorer.name: cause} if cause else {}
        segmented = segmented or any(isinstance(response, list) for response in responses)
        placed = _placed(responses, rollouts, parts, tokenizer, scorer.name).to(device)
        said = torch.tensor([response is not None for response in responses], device=device)
        total += scorer.weight * placed
        judged |= said
        by_scorer[scorer.name] = placed.sum(1).masked_fill(~said, torch.nan)
        if (spread := getattr(scorer, "disagreement", None)) is not None:
            disagreement[scorer.name] = torch.tensor(spread, device=device)
        if (limited := getattr(scorer, "cut", None)) is not None:
            cut[scorer.name] = torch.tensor(limited, device=device)
    if not bool((judged | failed).all()):
        row = int((~judged & ~failed).nonzero()[0])
        raise RewardError(f"no scorer had a score for sample {row} ({rollouts.texts[row][:60]!r})", where="rewards")
    placed_sums, kept = total if segmented else None, ~failed
    scored = ScoredRollouts(rollouts, total.sum(1), placed_sums, by_scorer, kept, disagreement, cut, failures)
    return _with_logged(scored, scorers)


def _with_logged(scored: ScoredRollouts, scorers: Sequence[Scorer]) -> ScoredRollouts:
    """The same with what reward functions logged of this batch; the metrics of one name come together."""
    functions = [scorer for scorer in scorers if isinstance(scorer, FunctionScorer)]
    metrics: dict[str, list[float]] = {}
    for scorer in functions:
        for name, values in scorer.logged.metrics.items():
            metrics[name] = metrics.get(name, []) + values
    columns = {name: values for scorer in functions for name, values in scorer.logged.columns.items()}
    return replace(scored, logged=metrics, columns=columns)


def _ask(
    scorer: Scorer, rollouts: Rollouts, parts: list[list[str]] | None, on_failure: str
) -> tuple[list[Score], list[bool], str]:
    """A scorer's answers, None where it failed, which samples it failed on, and why on the first."""
    try:
        responses = scorer(rollouts, parts)
    except RewardError as error:
        if on_failure == "stop":
            raise
        return [None] * len(rollouts.texts), [True] * len(rollouts.texts), str(error)
    causes = [
        RewardError(f"{response.reason}: sample {row} ({rollouts.texts[row][:60]!r})", where=scorer.name)
        for row, response in enumerate(responses)
        if isinstance(response, NoScore)
    ]
    if causes and on_failure == "stop":
        raise causes[0]
    scores: list[Score] = [None if isinstance(response, NoScore) else response for response in responses]
    lost = [isinstance(response, NoScore) for response in responses]
    return scores, lost, str(causes[0]) if causes else ""


def _placed(
    responses: list[Score],
    rollouts: Rollouts,
    parts: list[list[str]] | None,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Tensor:
    """Scores [B, T], each on the last token of what it judges."""
    placed = torch.zeros(rollouts.response_mask.shape)
    last = last_counted_index(rollouts.response_mask).tolist()
    for row, response in enumerate(responses):
        if isinstance(response, list):
            texts, values = _segments_of(response, row, rollouts, parts, name)
            for place, value in zip(token_ends(rollouts, row, texts, tokenizer), values, strict=True):
                placed[row, place] += value
        elif isinstance(response, float):
            placed[row, last[row]] = response
    return placed


def _segments_of(
    response: list[Any], row: int, rollouts: Rollouts, parts: list[list[str]] | None, name: str
) -> tuple[list[str], list[float]]:
    """The texts and scores of one answer's segments: its own (text, score) pairs, or a number for each given part."""
    if response and isinstance(response[0], tuple):
        texts, values = [text for text, _ in response], [value for _, value in response]
        if "".join(texts) != rollouts.texts[row]:
            raise RewardError(f"the segments of sample {row} do not join to its answer", where=name)
        return texts, values
    if parts is None:
        raise RewardError(
            f"sample {row} got a list of rewards", where=name, fix="set reward.segments, or return (text, reward) pairs"
        )
    if len(response) != len(parts[row]):
        raise RewardError(f"sample {row} has {len(parts[row])} segments, got {len(response)} rewards", where=name)
    return parts[row], response


def token_ends(rollouts: Rollouts, row: int, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """For each segment the index of the token that completes it; the last segment ends with the response.

    A character of several tokens is complete with the last of them: before that, it decodes to something else.
    """
    tokens = rollouts.response_tokens[row][rollouts.response_mask[row]].tolist()
    before = rollouts.prompts[row].tokens
    decoded = [continuation(tokenizer, before, tokens[: t + 1]) for t in range(len(tokens))]
    reached = [common_prefix_length(text, decoded[-1]) for text in decoded]
    ends, length = [], 0
    for text in texts[:-1]:
        length += len(text.rstrip())
        ends.append(next((t for t, size in enumerate(reached) if size >= length), len(tokens) - 1))
        length += len(text) - len(text.rstrip())
    return [*ends, len(tokens) - 1]
