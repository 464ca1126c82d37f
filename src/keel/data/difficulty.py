"""Choose prompts by the scores that a policy got for them (`prompts.difficulty`)."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keel.data.preferences import prompt_key
from keel.data.prompts import Prompt
from keel.data.rows import read_rows, reject, require, require_content
from keel.errors import DataError

FIX = "measure with `keel evaluate --output FILE.json`, with rewards and one policy"


def mean_scores(path: str) -> dict[str, float]:
    """Return the mean score of the responses to each prompt, by `prompt_key`.

    Args:
        path: JSON file that `keel evaluate --output` wrote, or a file of rows with `prompt` and `score`.

    Raises DataError.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for prompt, values in _read_evaluation(path) if path.endswith(".json") else _read_scored_rows(path):
        scores[prompt_key(prompt)] += values
    return {key: math.fsum(values) / len(values) for key, values in scores.items() if values}


def _read_evaluation(path: str) -> Iterator[tuple[Any, list[float]]]:
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["answers"]
        scores = [(row["prompt"], [float(score) for score in row["policy_scores"]]) for row in rows]
        if not all(math.isfinite(score) for _, values in scores for score in values):
            raise ValueError("a score is not finite")
        yield from scores
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"cannot read the scores of an evaluation: {reason}", where=path, fix=FIX) from error


def _read_scored_rows(path: str) -> Iterator[tuple[Any, list[float]]]:
    for row in read_rows(path):
        score = float(require(row, path, "score", (int, float)))
        if not math.isfinite(score):
            reject(row, path, f'"score" is {score}')
        yield require_content(row, path, "prompt"), [score]


def filter_by_score(
    prompts: Sequence[Prompt],
    scores: dict[str, float],
    lowest: float | None,
    highest: float | None,
    where: str,
) -> tuple[list[Prompt], int, int]:
    """Return the prompts whose score is within the limits, and the numbers of those below and above.

    Args:
        where: file of the scores, for errors.

    Raises DataError if a prompt has no score, or no prompt is left.
    """
    unknown = [prompt.text for prompt in prompts if prompt_key(prompt.content) not in scores]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(prompts)} prompts have no score, such as {unknown[0][:60]!r}",
            where=where,
            fix="measure all prompts of the run, with the same prompts settings",
        )
    known = [(prompt, scores[prompt_key(prompt.content)]) for prompt in prompts]
    below = sum(lowest is not None and score < lowest for _, score in known)
    above = sum(highest is not None and score > highest for _, score in known)
    kept = [
        prompt
        for prompt, score in known
        if not (lowest is not None and score < lowest) and not (highest is not None and score > highest)
    ]
    if not kept:
        raise DataError(
            f"no prompt has a score within the limits: {below} are below and {above} above",
            where=where,
            fix="change prompts.difficulty.min_score or max_score",
        )
    return kept, below, above
