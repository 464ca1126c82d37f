"""What a step leaves behind: its metrics (docs/metrics.md) and a few of its answers, token by token."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from keel.config import TrainConfig
from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.diagnosis.findings import Finding
from keel.run.folder import RunFolder
from keel.run.metrics import JsonlMetrics, MetricSink, RolloutLog, TensorBoardMetrics, truncate_after
from keel.progress import ProgressDisplay
from keel.training.watch import Watch
from keel.world import World

CONTEXT = 4  # tokens that decide how the next one is written


@dataclass(frozen=True)
class Records:
    """Where a run writes while it goes on. Only the main rank has anything to write to."""

    sinks: Sequence[MetricSink] = ()
    answers: RolloutLog | None = None
    display: ProgressDisplay | None = None
    watch: Watch | None = None

    def log(self, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> Finding | None:
        """Returns what the doctor stops the run for, if anything. Raises CheckpointError when a file cannot be had."""
        for sink in self.sinks:
            sink.log(step, metrics)
        if self.answers is not None:
            self.answers.log(step, rows)
        if self.display is not None:
            self.display.show(step, headline(metrics))
        return None if self.watch is None else self.watch.look(step, metrics)


@contextmanager
def open_records(folder: RunFolder, config: TrainConfig, done: int, world: World) -> Iterator[Records]:
    """The run folder's logs, cut back to the step that the run goes on from, and the progress display."""
    if not world.is_main:
        yield Records()
        return
    truncate_after(folder.metrics, done, first=1)
    truncate_after(folder.rollouts, done, first=1 if config.log.rollouts_per_step else None)
    sinks: list[MetricSink] = [JsonlMetrics(folder.metrics)]
    if "tensorboard" in config.log.trackers:
        sinks.append(TensorBoardMetrics(folder.tensorboard, done + 1))
    with ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        display = stack.enter_context(ProgressDisplay("train", config.steps, done))
        yield Records(sinks, RolloutLog(folder.rollouts), display, Watch.of(folder, config))


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures worth a place in the progress display."""
    names = {
        "objective/scores": "score",
        "objective/kl": "kl",
        "response/length": "length",
        "critic/explained_variance": "explained",
        "perf/tokens_per_second": "tok/s",
    }
    return {short: metrics[name] for name, short in names.items() if name in metrics}


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
            **logged_of(scored, row),
        }


def logged_of(scored: ScoredRollouts, row: int) -> dict[str, Any]:
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
