"""The figures of a step (docs/metrics.md): what its answers are worth, what they look like, what the update aims at."""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from keel.core.advantages import equal_groups
from keel.core.diagnostics import approx_kl, explained_variance
from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.data.rows import Content
from keel.errors import RewardError
from keel.learn.targets import moments
from keel.learn.totals import Totals
from keel.training.setup import TrainingSetup
from keel.world import World

NGRAM = 4


def step_metrics(
    parts: TrainingSetup, scored: ScoredRollouts, token_scores: Tensor, batch: TrainingBatch, kl_coef: float
) -> dict[str, float]:
    """Figures of the answers and of what the update aims at, over all ranks; `token_scores` are the shaped ones."""
    world, group_size = parts.world, parts.config.rollout.group_size or 1
    totals = objective_totals(scored, batch, kl_coef, has_reference=parts.reference is not None)
    add_response_metrics(totals, scored)
    scorer_totals(totals, parts, scored)
    totals.add("sampler/approx_kl", approx_kl(batch.logprobs, scored.rollouts.logprobs)[batch.response_mask])
    if group_size > 1:
        totals.add("groups/equal_scores", equal_groups(scored.scores, group_size).float())
    metrics = totals.reduce(world)
    metrics |= {"objective/kl_coef": kl_coef, "objective/scores_std": deviation(scored.scores, scored.kept, world)}
    shaped = token_scores.sum(1)
    mean, variance = moments(shaped, scored.kept, world)
    metrics |= {"objective/shaped_scores": float(mean), "objective/shaped_scores_std": float(variance) ** 0.5}
    if parts.actor_critic.has_critic:
        metrics |= critic_metrics(batch, world)
    return metrics | full_batch_metrics(scored, world) | credit_metrics(shaped, batch, world)


def objective_totals(scored: ScoredRollouts, batch: TrainingBatch, kl_coef: float, has_reference: bool) -> Totals:
    """The terms of the objective; dropped answers are in none but their own share."""
    totals, mask = Totals(), batch.response_mask
    whole = mask.any(1)
    totals.add("objective/scores", scored.scores[scored.kept])
    if has_reference:
        kl = (batch.logprobs - batch.ref_logprobs).masked_fill(~mask, 0.0)
        totals.add("objective/kl", kl.sum(1)[whole])
        totals.add("objective/non_score_reward", -kl_coef * kl.sum(1)[whole])
        totals.add("objective/reference_logprob", batch.ref_logprobs[mask])
    totals.add("objective/rlhf_reward", batch.rewards.sum(1)[whole])
    totals.add("objective/entropy", -batch.logprobs.masked_fill(~mask, 0.0).sum(1)[whole])
    totals.add("reward/dropped", 1.0 - whole.float())
    return totals


def add_response_metrics(totals: Totals, scored: ScoredRollouts) -> None:
    """What the answers look like."""
    rollouts = scored.rollouts
    totals.add("response/length", rollouts.lengths.float())
    totals.add("response/truncated", rollouts.truncated.float())
    rows = zip(rollouts.response_tokens.cpu(), rollouts.response_mask.cpu(), strict=True)
    totals.add("response/repetition", torch.tensor([repeated_share(row[mask].tolist()) for row, mask in rows]))


def scorer_totals(totals: Totals, parts: TrainingSetup, scored: ScoredRollouts) -> None:
    """What each scorer said, how far an ensemble's members were apart, how many texts a reward model could not read in
    full, and how much was said of answers whose scores lie beyond all those of held-out answers."""
    for name, scores in scored.by_scorer.items():
        said = scores[scores.isfinite()]
        totals.add(f"rewards/{name}", said)
        if name in parts.ranges:
            known = parts.ranges[name]
            beyond = (said < known["score_lowest"]) | (said > known["score_highest"])
            totals.add(f"outside_range/{name}", beyond.float())
    names = parts.world.gather(torch.tensor([_number(str(sorted(scored.logged)))], device=scored.scores.device))
    if len(names.unique()) > 1:
        raise RewardError("reward functions logged other metrics in one process than in another", where="log_metric")
    for name, values in scored.logged.items():
        totals.add(f"logged/{name}", torch.tensor(values, dtype=torch.float64))
    for name, apart in scored.disagreement.items():
        totals.add(f"disagreement/{name}", apart)
    for name, cut in scored.cut.items():
        totals.add(f"cut/{name}", cut.float())


def critic_metrics(batch: TrainingBatch, world: World) -> dict[str, float]:
    """Compare the values with the returns, over all ranks."""
    mask = batch.response_mask
    values, _ = moments(batch.values, mask, world)
    returns, spread = moments(batch.returns, mask, world)
    _, unexplained = moments(batch.returns - batch.values, mask, world)
    return {
        "critic/values": float(values),
        "critic/returns": float(returns),
        "critic/returns_std": float(spread) ** 0.5,
        "critic/advantages_std": float(unexplained) ** 0.5,
        "critic/explained_variance": float(explained_variance(batch.values, batch.returns, mask, world.sum)),
    }


def full_batch_metrics(scored: ScoredRollouts, world: World) -> dict[str, float]:
    """Figures that need all answers of all ranks side by side."""
    rollouts = scored.rollouts
    device = scored.scores.device
    scores = world.gather(torch.where(scored.kept, scored.scores, torch.nan).double())
    lengths = world.gather(rollouts.lengths.double())
    texts = world.gather(torch.tensor([_number(text) for text in rollouts.texts], device=device))
    prompts = world.gather(torch.tensor([_number(prompt.content) for prompt in rollouts.prompts], device=device))
    known = scores[scores.isfinite()]
    low, middle, high = known.quantile(known.new_tensor([0.1, 0.5, 0.9])).tolist() if len(known) else [math.nan] * 3
    metrics = {
        "objective/scores_low": low,
        "objective/scores_median": middle,
        "objective/scores_high": high,
        "response/length_std": float(lengths.std(correction=0)),
        "response/distinct": len(texts.unique()) / len(texts),
        "response/length_correlation": rank_correlation(scores, lengths),
        "prompts/distinct": len(prompts.unique()) / len(prompts),
    }
    if len(scored.by_scorer) > 1:
        for name, said in scored.by_scorer.items():
            own = world.gather(said.double())
            finite = own[own.isfinite()]
            metrics[f"agreement/{name}"] = rank_correlation(scores, own)
            metrics[f"spread/{name}"] = float(finite.std(correction=0)) if len(finite) else math.nan
    return metrics


def credit_metrics(scores: Tensor, batch: TrainingBatch, world: World) -> dict[str, float]:
    """Correlation of an answer's score [B] with the mean advantage of its first and of its last quarter: whether what
    an answer was worth reaches the tokens that began it."""
    mask = batch.response_mask
    place, length = mask.cumsum(1), mask.sum(1, keepdim=True)
    quarter = (length + 3) // 4
    parts = {"credit/early": mask & (place <= quarter), "credit/late": mask & (place > length - quarter)}
    shown = torch.where(mask.any(1), scores, torch.nan)
    found = {name: batch.advantages.masked_fill(~part, 0).sum(1) / part.sum(1) for name, part in parts.items()}
    return {name: correlation(world.gather(shown), world.gather(own)) for name, own in found.items()}


def deviation(x: Tensor, mask: Tensor, world: World) -> float:
    """Biased standard deviation of the counted entries of all ranks."""
    return float(moments(x, mask, world)[1]) ** 0.5


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, over the pairs [N] that are both finite; nan when one of them does not vary."""
    both = x.isfinite() & y.isfinite()
    return correlation(_ranks(x[both]), _ranks(y[both]))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, over the pairs [N] that are both finite; nan when one of them does not vary."""
    both = x.isfinite() & y.isfinite()
    pairs = torch.stack([x[both], y[both]]).double()
    if pairs.shape[1] < 2 or bool((pairs.std(1) == 0).any()):
        return math.nan
    return float(torch.corrcoef(pairs)[0, 1])


def repeated_share(tokens: list[int], size: int = NGRAM) -> float:
    """Share of an answer's n-grams that stood in it before; 0 for an answer too short to have two."""
    count = len(tokens) - size + 1
    if count < 2:
        return 0.0
    return 1 - len({tuple(tokens[i : i + size]) for i in range(count)}) / count


def _ranks(x: Tensor) -> Tensor:
    """Mean ranks: equal values share theirs. [N] -> [N]"""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def _number(content: Content) -> int:
    """The same for the same text, on every rank."""
    return int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:8], "little", signed=True)


def speed_metrics(seconds: Mapping[str, float], step: int, num_responses: int, num_tokens: float) -> dict[str, float]:
    """Time of each phase of a step, and its rates, over all processes."""
    total = sum(seconds.values())
    return {
        **{f"time/{phase}_seconds": value for phase, value in seconds.items()},
        "time/step_seconds": total,
        "perf/tokens_per_second": num_tokens / total,
        "perf/responses_per_second": num_responses / total,
        "progress/responses": float(step * num_responses),
    }
