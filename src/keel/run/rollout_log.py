"""Responses of a run with everything known of their tokens, some of every step: what is written to rollouts.jsonl."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.run.metrics_log import append_lines
from keel.run.rollout_line import encode_line

CONTEXT = 4  # tokens that decide how the next one is written


class RolloutLog:
    """Responses with their scores, some of every step; the form of a line is in keel.run.rollout_line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows of a step. Raises CheckpointError when the file cannot be written."""
        append_lines(self._path, [encode_line(step, row) for row in rows])


def rollout_rows(
    scored: ScoredRollouts, batch: TrainingBatch, count: int, tokenizer: Any, new_logprobs: Tensor | None = None
) -> Iterator[dict[str, Any]]:
    """The first answers of a step with everything known of their tokens, short figures first.

    `new_logprobs` [N, T] are those of the first N answers after the update, which gives their tokens' `ratio`.
    """
    rollouts = scored.rollouts
    count = min(count, len(rollouts.texts))
    for row in range(count):
        counted = rollouts.response_mask[row]
        tokens = rollouts.response_tokens[row][counted].tolist()
        by_token = {
            name: _rounded(getattr(batch, name)[row][counted])
            for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages")
        }
        if new_logprobs is not None and row < len(new_logprobs):
            width = new_logprobs.shape[1]
            moved = (new_logprobs[row] - batch.logprobs[row, :width])[counted[:width]]
            by_token["ratio"] = _rounded(moved.exp())
        yield {
            "row": row,
            "rows": count,
            "score": float(scored.scores[row]) if scored.kept[row] else None,
            "kl": float((batch.logprobs[row] - batch.ref_logprobs[row])[counted].sum()),
            "length": int(counted.sum()),
            "truncated": bool(rollouts.truncated[row]),
            "scores": {name: float(values[row]) for name, values in scored.by_scorer.items()},
            "prompt": rollouts.prompts[row].content,
            "response": rollouts.texts[row],
            "tokens": tokens,
            "pieces": pieces(tokenizer, tokens),
            **by_token,
            **logged_columns(scored, row),
        }


def logged_columns(scored: ScoredRollouts, row: int) -> dict[str, Any]:
    """What reward functions logged of one response; last in a line, for its names and texts may be anything."""
    return {"logged": {name: values[row] for name, values in scored.columns.items()}} if scored.columns else {}


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; special tokens by their names."""
    found = []
    for place in range(len(tokens)):
        before = list(tokens[max(0, place - CONTEXT) : place])
        start, whole = tokenizer.decode(before), tokenizer.decode([*before, tokens[place]])
        found.append(whole[len(start) :] if whole.startswith(start) else tokenizer.decode([tokens[place]]))
    return found


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
