"""What a step leaves behind: its metrics (docs/metrics.md) and a few of its answers, token by token."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from keel.config import TrainConfig
from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.learn.targets import moments
from keel.learn.totals import Totals
from keel.run.folder import RunFolder
from keel.run.metrics import JsonlMetrics, MetricSink, RolloutLog, TensorBoardMetrics, truncate_after
from keel.train.progress import ProgressDisplay
from keel.world import World


@dataclass(frozen=True)
class Records:
    """Where a run writes while it goes on. Only the main rank has anything to write to."""

    sinks: Sequence[MetricSink] = ()
    answers: RolloutLog | None = None
    display: ProgressDisplay | None = None

    def log(self, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises CheckpointError when a file cannot be written."""
        for sink in self.sinks:
            sink.log(step, metrics)
        if self.answers is not None:
            self.answers.log(step, rows)
        if self.display is not None:
            self.display.show(step, headline(metrics))


@contextmanager
def open_records(folder: RunFolder, config: TrainConfig, done: int, world: World) -> Iterator[Records]:
    """The run folder's logs, cut back to the step that the run goes on from, and the progress display."""
    if not world.is_main:
        yield Records()
        return
    truncate_after(folder.metrics, done)
    truncate_after(folder.rollouts, done)
    sinks: list[MetricSink] = [JsonlMetrics(folder.metrics)]
    if "tensorboard" in config.log.trackers:
        sinks.append(TensorBoardMetrics(folder.tensorboard, done + 1))
    with ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        display = stack.enter_context(ProgressDisplay("train", config.steps, done))
        yield Records(sinks, RolloutLog(folder.rollouts), display)


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


def step_metrics(
    scored: ScoredRollouts,
    batch: TrainingBatch,
    kl_coef: float,
    group_size: int,
    has_critic: bool,
    has_reference: bool,
    world: World,
) -> dict[str, float]:
    """Figures of the answers and of what the update aims at, over all ranks."""
    rollouts, kept, totals = scored.rollouts, scored.kept, Totals()
    mask = batch.response_mask
    kl = (batch.logprobs - batch.ref_logprobs).masked_fill(~mask, 0.0)
    whole = mask.any(1)
    totals.add("objective/scores", scored.scores[kept])
    if has_reference:
        totals.add("objective/kl", kl.sum(1)[whole])
        totals.add("objective/non_score_reward", -kl_coef * kl.sum(1)[whole])
    totals.add("objective/rlhf_reward", batch.rewards.sum(1)[whole])
    totals.add("objective/entropy", -batch.logprobs.masked_fill(~mask, 0.0).sum(1)[whole])
    totals.add("response/length", rollouts.lengths.float())
    totals.add("response/truncated", rollouts.truncated.float())
    totals.add("reward/dropped", 1.0 - whole.float())
    for name, scores in scored.by_scorer.items():
        totals.add(f"rewards/{name}", scores[scores.isfinite()])
    if has_critic:
        totals.add("critic/values", batch.values[mask])
        totals.add("critic/returns", batch.returns[mask])
    if group_size > 1:
        totals.add("groups/equal_scores", _equal_groups(scored, group_size))
    metrics = totals.reduced(world)
    metrics["objective/scores_std"] = float(moments(scored.scores, kept, world)[1]) ** 0.5
    if has_critic:  # core.diagnostics.explained_variance, over all ranks
        _, spread = moments(batch.returns, mask, world)
        _, unexplained = moments(batch.returns - batch.values, mask, world)
        metrics["critic/explained_variance"] = float(1 - unexplained / spread) if spread > 0 else math.nan
    return {**metrics, "objective/kl_coef": kl_coef}


def rollout_rows(scored: ScoredRollouts, batch: TrainingBatch, count: int) -> Iterator[dict[str, Any]]:
    """The first answers of a step with everything known of their tokens."""
    rollouts = scored.rollouts
    for row in range(min(count, len(rollouts.texts))):
        counted = rollouts.response_mask[row]
        tokens = {
            name: [round(value, 5) for value in getattr(batch, name)[row][counted].tolist()]
            for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages")
        }
        yield {
            "prompt": rollouts.prompts[row].content,
            "response": rollouts.texts[row],
            "score": float(scored.scores[row]) if scored.kept[row] else None,
            "scores": {name: float(values[row]) for name, values in scored.by_scorer.items()},
            "kl": float((batch.logprobs[row] - batch.ref_logprobs[row])[counted].sum()),
            "length": int(counted.sum()),
            "truncated": bool(rollouts.truncated[row]),
            "tokens": rollouts.response_tokens[row][counted].tolist(),
            **tokens,
        }


def _equal_groups(scored: ScoredRollouts, group_size: int) -> torch.Tensor:
    """1 for each group whose answers all got the same score, so that it teaches nothing."""
    groups = scored.scores.view(-1, group_size)
    return (groups == groups[:, :1]).all(1).float()
