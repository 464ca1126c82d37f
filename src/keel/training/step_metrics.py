"""The metrics of a training step (docs/metrics.md): of its scores, of its responses and of the update's targets."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple

import torch
from torch import Tensor

from keel.core.advantages import equal_groups
from keel.core.diagnostics import approx_kl, explained_variance
from keel.core.kl import RESOLUTION
from keel.data.batches import Rollouts, ScoredRollouts, TrainingBatch
from keel.data.rows import Content
from keel.errors import RewardError
from keel.judge.judge import USAGE
from keel.learn.targets import all_rank_moments
from keel.learn.totals import Totals
from keel.rollout.judge_scorer import JudgeScorer
from keel.rollout.scorers import Scorer
from keel.stats.ranks import mean_ranks
from keel.training.resampling import resampling_metrics
from keel.training.setup import TrainingSetup
from keel.world import World

NGRAM = 4


def step_metrics(
    setup: TrainingSetup, scored: ScoredRollouts, token_scores: Tensor, batch: TrainingBatch, kl_coef: float
) -> dict[str, float]:
    """Compute the metrics of the responses and of the update's targets, over all ranks.

    Args:
        token_scores: [B, T], shaped scores.
    """
    world, group_size = setup.world, setup.config.rollout.group_size or 1
    totals = objective_totals(scored, batch, kl_coef, has_reference=setup.reference is not None)
    add_response_metrics(totals, scored)
    add_scorer_metrics(totals, setup, scored)
    add_sampler_metrics(totals, scored.rollouts, batch, setup.targets.correction_cap)
    if group_size > 1:
        totals.add("groups/equal_scores", equal_groups(scored.scores, group_size).float())
    metrics = totals.reduce(world)
    metrics |= judge_metrics(setup.scorers, world)
    metrics |= {"objective/kl_coef": kl_coef, "objective/scores_std": deviation(scored.scores, scored.kept, world)}
    shaped = token_scores.sum(1)
    mean, variance = all_rank_moments(shaped, scored.kept, world)
    metrics |= {"objective/shaped_scores": float(mean), "objective/shaped_scores_std": float(variance) ** 0.5}
    if setup.actor_critic.has_critic:
        metrics |= critic_metrics(batch, world)
    metrics |= full_batch_metrics(scored, world) | resampling_metrics(setup, scored)
    return metrics | credit_metrics(shaped, batch, world)


def objective_totals(scored: ScoredRollouts, batch: TrainingBatch, kl_coef: float, has_reference: bool) -> Totals:
    """Sum the terms of the objective. A dropped response counts in `reward/dropped` alone."""
    totals, mask = Totals(), batch.response_mask
    kept = mask.any(1)
    totals.add("objective/scores", scored.scores[scored.kept])
    if has_reference:
        kl = (batch.logprobs - batch.ref_logprobs).masked_fill(~mask, 0.0)
        totals.add("objective/kl", kl.sum(1)[kept])
        totals.add("objective/non_score_reward", -kl_coef * kl.sum(1)[kept])
        totals.add("objective/reference_logprob", batch.ref_logprobs[mask])
    totals.add("objective/rlhf_reward", batch.rewards.sum(1)[kept])
    totals.add("objective/entropy", -batch.logprobs.masked_fill(~mask, 0.0).sum(1)[kept])
    totals.add("reward/dropped", 1.0 - kept.float())
    return totals


def add_sampler_metrics(totals: Totals, rollouts: Rollouts, batch: TrainingBatch, cap: float | None) -> None:
    """Add how far the sampler's log-probs are from the trainer's, and the corrections of the policy loss for it."""
    mask = batch.response_mask
    logprobs, sampler_logprobs = batch.logprobs[mask], rollouts.logprobs[mask]
    totals.add("sampler/approx_kl", approx_kl(logprobs, sampler_logprobs))
    totals.add("sampler/correction", batch.weights[mask])
    is_capped = logprobs - sampler_logprobs > (math.inf if cap is None else max(math.log(cap), RESOLUTION))
    totals.add("sampler/corrections_capped", is_capped.float())


def add_response_metrics(totals: Totals, scored: ScoredRollouts) -> None:
    """Add length, truncation and repetition of the responses."""
    rollouts = scored.rollouts
    totals.add("response/length", rollouts.lengths.float())
    totals.add("response/truncated", rollouts.truncated.float())
    rows = zip(rollouts.response_tokens.cpu(), rollouts.response_mask.cpu(), strict=True)
    totals.add("response/repetition", torch.tensor([repeated_share(row[mask].tolist()) for row, mask in rows]))


def add_scorer_metrics(totals: Totals, setup: TrainingSetup, scored: ScoredRollouts) -> None:
    """Add the metrics of each scorer: its scores, and for reward models the scores out of range, the disagreement of
    an ensemble and the share of texts that were cut. Also add what reward functions logged.

    Raises RewardError where reward functions logged different names in different processes.
    """
    for name, scores in scored.by_scorer.items():
        finite = scores[scores.isfinite()]
        totals.add(f"rewards/{name}", finite)
        if name in setup.ranges:
            limits = setup.ranges[name]
            beyond = (finite < limits["score_lowest"]) | (finite > limits["score_highest"])
            totals.add(f"outside_range/{name}", beyond.float())
    # The totals are summed over all ranks by position, so every rank must have the same names.
    names = setup.world.gather(torch.tensor([_hash(str(sorted(scored.logged)))], device=scored.scores.device))
    if len(names.unique()) > 1:
        raise RewardError(
            "reward functions logged different names in different processes",
            where="log_metric",
            fix="log the same names in every call",
        )
    for name, values in scored.logged.items():
        totals.add(f"logged/{name}", torch.tensor(values, dtype=torch.float64))
    for name, deviations in scored.disagreement.items():
        totals.add(f"disagreement/{name}", deviations)
    for name, cut in scored.cut.items():
        totals.add(f"cut/{name}", cut.float())


def judge_metrics(scorers: Sequence[Scorer], world: World) -> dict[str, float]:
    """Return what each judge was asked since the last call, and its cost: sums over all processes."""
    metrics: dict[str, float] = {}
    for scorer in scorers:
        if isinstance(scorer, JudgeScorer):
            usage = torch.tensor(astuple(scorer.judge.take_usage()), dtype=torch.float64, device=world.device)
            totals = world.sum(usage).tolist()
            metrics |= {f"judge_{name}/{scorer.name}": total for name, total in zip(USAGE, totals, strict=True)}
    return metrics


def critic_metrics(batch: TrainingBatch, world: World) -> dict[str, float]:
    """Compare the values with the returns, over all ranks.

    The explained variance is 1 - Var(returns - values) / Var(returns); NaN where the returns do not vary.
    """
    mask = batch.response_mask
    values, _ = all_rank_moments(batch.values, mask, world)
    returns, spread = all_rank_moments(batch.returns, mask, world)
    _, unexplained = all_rank_moments(batch.returns - batch.values, mask, world)
    return {
        "critic/values": float(values),
        "critic/returns": float(returns),
        "critic/returns_std": float(spread) ** 0.5,
        "critic/advantages_std": float(unexplained) ** 0.5,
        "critic/explained_variance": float(explained_variance(batch.values, batch.returns, mask, world.sum)),
    }


def full_batch_metrics(scored: ScoredRollouts, world: World) -> dict[str, float]:
    """Compute the metrics that need the responses of all ranks together: quantiles, distinct texts, correlations."""
    rollouts = scored.rollouts
    device = scored.scores.device
    scores = world.gather(torch.where(scored.kept, scored.scores, torch.nan).double())
    lengths = world.gather(rollouts.lengths.double())
    texts = world.gather(torch.tensor([_hash(text) for text in rollouts.texts], device=device))
    prompts = world.gather(torch.tensor([_hash(prompt.content) for prompt in rollouts.prompts], device=device))
    finite = scores[scores.isfinite()]
    low, median, high = finite.quantile(finite.new_tensor([0.1, 0.5, 0.9])).tolist() if len(finite) else [math.nan] * 3
    metrics = {
        "objective/scores_low": low,
        "objective/scores_median": median,
        "objective/scores_high": high,
        "response/length_std": float(lengths.std(correction=0)),
        "response/distinct": len(texts.unique()) / len(texts),
        "response/length_correlation": rank_correlation(scores, lengths),
        "prompts/distinct": len(prompts.unique()) / len(prompts),
    }
    if len(scored.by_scorer) > 1:
        for name, values in scored.by_scorer.items():
            gathered = world.gather(values.double())
            finite = gathered[gathered.isfinite()]
            metrics[f"agreement/{name}"] = rank_correlation(scores, gathered)
            metrics[f"spread/{name}"] = float(finite.std(correction=0)) if len(finite) else math.nan
    return metrics


def credit_metrics(scores: Tensor, batch: TrainingBatch, world: World) -> dict[str, float]:
    """Correlate the scores of the responses [B] with the mean advantages of their first and last quarters.

    `credit/early` near 0 means that the score does not reach the first tokens of a response.
    """
    mask = batch.response_mask
    position, length = mask.cumsum(1), mask.sum(1, keepdim=True)
    size = (length + 3) // 4
    quarters = {"credit/early": mask & (position <= size), "credit/late": mask & (position > length - size)}
    kept = world.gather(torch.where(mask.any(1), scores, torch.nan))
    means = {name: batch.advantages.masked_fill(~part, 0).sum(1) / part.sum(1) for name, part in quarters.items()}
    return {name: correlation(kept, world.gather(mean)) for name, mean in means.items()}


def deviation(x: Tensor, mask: Tensor, world: World) -> float:
    """Compute the biased standard deviation of the entries in the mask, over all ranks."""
    return float(all_rank_moments(x, mask, world)[1]) ** 0.5


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Compute Spearman's correlation over the pairs [N] that are both finite; NaN when one side does not vary."""
    both = x.isfinite() & y.isfinite()
    ranks = [torch.from_numpy(mean_ranks(side[both].cpu().numpy())) for side in (x, y)]
    return correlation(*ranks)


def correlation(x: Tensor, y: Tensor) -> float:
    """Compute Pearson's correlation over the pairs [N] that are both finite; NaN when one side does not vary."""
    both = x.isfinite() & y.isfinite()
    pairs = torch.stack([x[both], y[both]]).double()
    if pairs.shape[1] < 2 or bool((pairs.std(1) == 0).any()):
        return math.nan
    return float(torch.corrcoef(pairs)[0, 1])


def repeated_share(tokens: list[int], size: int = NGRAM) -> float:
    """Return the share of n-grams that repeat an earlier one; 0 for a response too short to have two n-grams."""
    count = len(tokens) - size + 1
    if count < 2:
        return 0.0
    return 1 - len({tuple(tokens[i : i + size]) for i in range(count)}) / count


def _hash(content: Content) -> int:
    """Hash a text to 64 bits. Python's `hash` differs between processes, and ranks compare these numbers."""
    return int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:8], "little", signed=True)


def speed_metrics(seconds: Mapping[str, float], step: int, num_responses: int, num_tokens: float) -> dict[str, float]:
    """Return the seconds of each phase of a step, and the rates over all processes."""
    total = sum(seconds.values())
    return {
        **{f"time/{phase}_seconds": value for phase, value in seconds.items()},
        "time/step_seconds": total,
        "perf/tokens_per_second": num_tokens / total,
        "perf/responses_per_second": num_responses / total,
        "progress/responses": float(step * num_responses),
    }
