"""What a step leaves behind: its metrics (docs/metrics.md) and a few of its answers, token by token."""

from collections.abc import Iterator
from typing import Any

import torch

from keel.core.diagnostics import explained_variance
from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.learn.totals import Totals
from keel.world import World


def step_metrics(
    scored: ScoredRollouts, batch: TrainingBatch, kl_coef: float, group_size: int, has_critic: bool, world: World
) -> dict[str, float]:
    """Figures of the answers and of what the update aims at, over all ranks."""
    rollouts, kept, totals = scored.rollouts, scored.kept, Totals()
    mask = batch.response_mask
    kl = (batch.logprobs - batch.ref_logprobs).masked_fill(~mask, 0.0)
    whole = mask.any(1)
    totals.add("objective/scores", scored.scores[kept])
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
    scores = world.gather(torch.where(kept, scored.scores, torch.nan))
    metrics["objective/scores_std"] = float(scores[scores.isfinite()].std(correction=0))
    if has_critic:
        metrics["critic/explained_variance"] = float(explained_variance(batch.values, batch.returns, mask))
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
