"""ScoredRollouts -> TrainingBatch: everything the update aims at, computed once with the weights that sampled."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from keel.core.kl import kl_estimate
from keel.core.masked import apply_whitening, masked_sum, zero_outside
from keel.core.rewards import token_rewards
from keel.data.batches import Rollouts, ScoredRollouts, TrainingBatch, select_rows
from keel.learn.algorithms import Algorithm, Credit
from keel.learn.optim import microbatches
from keel.models.policy import ActorCritic, Analysis, without_adapter
from keel.world import World, at_once


@dataclass(frozen=True)
class TargetSettings:
    temperature: float
    group_size: int
    microbatch_tokens: int
    kl_in: str
    kl_estimator: str
    gamma: float
    gae_lambda: float
    whiten_advantages: bool
    whiten_rewards: bool
    normalize_std: bool
    truncation: str


def build_targets(
    scored: ScoredRollouts,
    token_scores: Tensor,
    actor_critic: ActorCritic,
    reference: ActorCritic | None,
    algorithm: Algorithm,
    settings: TargetSettings,
    kl_coef: float,
    world: World,
    trust_sampler: bool = False,
) -> TrainingBatch:
    """Log-probs, values, rewards, advantages and returns of a batch; `token_scores` [B, T] are the shaped scores.

    With `trust_sampler` the log-probs are those that the sampler gave, and not computed once more.
    Dropped responses (and with group baselines their whole group) leave the mask.
    """
    rollouts, mask = scored.rollouts, scored.rollouts.response_mask
    analysis, ref_logprobs = _own_and_reference(actor_critic, reference, rollouts, settings, not trust_sampler)
    kl = kl_estimate(analysis.logprobs, ref_logprobs, settings.kl_estimator)
    rewards = token_rewards(token_scores, kl, mask, kl_coef if settings.kl_in == "reward" else 0.0)
    counted = mask & _kept(scored.kept, settings.group_size if algorithm.compares_groups else 1).unsqueeze(1)
    if settings.whiten_rewards:
        rewards = whiten_all(rewards, counted, world, keep_mean=True)
    values = torch.zeros_like(rewards) if analysis.values is None else analysis.values
    after_cut = None
    if settings.truncation == "bootstrap" and analysis.final_values is not None:
        after_cut = analysis.final_values * rollouts.truncated
    credit = Credit(
        rewards=rewards,
        values=values,
        response_mask=mask,
        final_values=after_cut,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        group_size=settings.group_size,
        normalize_std=settings.normalize_std,
    )
    advantages, returns = algorithm.advantages(credit)
    if settings.whiten_advantages and not algorithm.compares_groups:
        advantages = whiten_all(advantages, counted, world)
    return TrainingBatch(
        prompt_tokens=rollouts.prompt_tokens,
        prompt_mask=rollouts.prompt_mask,
        response_tokens=rollouts.response_tokens,
        response_mask=counted,
        logprobs=analysis.logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        rewards=rewards,
        advantages=zero_outside(advantages, counted),
        returns=returns,
    )


def _own_and_reference(
    actor_critic: ActorCritic,
    reference: ActorCritic | None,
    rollouts: Rollouts,
    settings: TargetSettings,
    with_logprobs: bool,
) -> tuple[Analysis, Tensor]:
    """What the models that learn say, and the log-probs [B, T] under the reference (without one, the policy's own)."""
    arguments = rollouts, settings.temperature, settings.microbatch_tokens
    own = partial(analyze_all, actor_critic, *arguments, with_logprobs=with_logprobs)
    if reference is None:
        analysis = own()
        return analysis, analysis.logprobs
    theirs = partial(reference_logprobs, reference, *arguments)
    if reference.policy is actor_critic.policy:  # one base, with its adapter and without
        return own(), theirs()
    analysis, ref_logprobs = at_once(own, theirs)
    return analysis, ref_logprobs


def reference_logprobs(
    reference: ActorCritic, rollouts: Rollouts, temperature: float, microbatch_tokens: int
) -> Tensor:
    """Log-probs of the response tokens under the reference: a frozen copy, or the policy without its adapter. [B, T]"""
    with without_adapter(reference.policy):
        return analyze_all(reference, rollouts, temperature, microbatch_tokens, with_values=False).logprobs


@torch.no_grad()
def analyze_all(
    actor_critic: ActorCritic,
    rollouts: Rollouts,
    temperature: float,
    microbatch_tokens: int,
    with_values: bool = True,
    with_logprobs: bool = True,
) -> Analysis:
    """`analyze` over a whole batch in micro-batches of similar length, without gradients."""
    lengths = (rollouts.prompt_mask.sum(1) + rollouts.lengths).tolist()
    shape, device = rollouts.response_mask.shape, rollouts.response_mask.device
    dtype = torch.promote_types(next(actor_critic.policy.parameters()).dtype, torch.float32)
    logprobs, entropy, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))
    final_values = torch.zeros(shape[0], dtype=dtype, device=device)
    has_values = with_values and actor_critic.has_critic
    for rows in microbatches(lengths, microbatch_tokens):
        part = select_rows(rollouts, rows)
        found = actor_critic.analyze(part, temperature, with_values=with_values, with_logprobs=with_logprobs)
        index, width = torch.tensor(rows, device=device), part.response_mask.shape[1]
        logprobs[index, :width], entropy[index, :width] = found.logprobs, found.entropy
        if found.values is not None and found.final_values is not None:
            values[index, :width], final_values[index] = found.values, found.final_values
    return Analysis(logprobs, entropy, values if has_values else None, final_values if has_values else None)


def whiten_all(x: Tensor, mask: Tensor, world: World, keep_mean: bool = False) -> Tensor:
    """`core.masked.whiten` with the statistics of all ranks."""
    mean, var = moments(x, mask, world)
    return apply_whitening(x, mask, mean, var, keep_mean)


def moments(x: Tensor, mask: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the counted entries of all ranks; zeros when nothing is counted anywhere."""
    count = world.sum(mask.sum()).clamp(min=1)
    mean = world.sum(masked_sum(x, mask)) / count
    mean = mean + world.sum(masked_sum(x - mean, mask)) / count  # takes out the rounding: equal entries have variance 0
    return mean, world.sum(masked_sum((x - mean) ** 2, mask)) / count


def _kept(kept: Tensor, group_size: int) -> Tensor:
    """A response counts only if its whole group was scored. [B] -> [B]"""
    return kept.view(-1, group_size).all(1).repeat_interleave(group_size)
