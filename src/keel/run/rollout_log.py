"""Log responses of every step with the numbers of each token, in rollouts.jsonl."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.run.metrics_log import append_lines
from keel.run.rollout_line import encode_line

CONTEXT = 4  # preceding tokens that decide the text of a token


class RolloutLog:
    """Writes responses to rollouts.jsonl, in the format of keel.run.rollout_line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows of a step. Raises CheckpointError when the file cannot be written."""
        append_lines(self._path, [encode_line(step, row) for row in rows])


def rollout_rows(
    scored: ScoredRollouts, batch: TrainingBatch, count: int, tokenizer: Any, new_logprobs: Tensor | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the first `count` responses of a step with the numbers of their tokens.

    Args:
        new_logprobs: log-probs [N, T] of the first N responses after the update; with them the rows have `ratio`.
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
    """Return the values that reward functions logged for one response, under `logged`."""
    # Last in a line: names and texts are arbitrary, and may contain the keys that `find_parts` searches for.
    return {"logged": {name: values[row] for name, values in scored.columns.items()}} if scored.columns else {}


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds to the previous ones. Special tokens are written as their names."""
    texts = []
    for position in range(len(tokens)):
        context = list(tokens[max(0, position - CONTEXT) : position])
        start, text = tokenizer.decode(context), tokenizer.decode([*context, tokens[position]])
        texts.append(text[len(start) :] if text.startswith(start) else tokenizer.decode([tokens[position]]))
    return texts


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
