"""ScoredRollouts -> TrainingBatch: the targets of the update, computed once with the weights that sampled."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from keel.core.advantages import gae, group_deviations
from keel.core.kl import kl_estimate, without_rounding
from keel.core.losses import truncated_importance_weights
from keel.core.masked import ROUNDING, masked_moments, whiten, zero_outside
from keel.data.batches import Rollouts, ScoredRollouts, TrainingBatch, select_rows
from keel.learn.algorithms import Algorithm, Credit
from keel.learn.optim import microbatches
from keel.models.actor_critic import ActorCritic, Analysis, ValueUnits, without_adapter
from keel.models.sharding import gathered_weights, is_sharded
from keel.world import World, run_concurrently


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
    normalize_std: bool
    truncation: str
    correction_cap: float | None


LEAST_NATS = 0.5
"""Scores whose deviation is this many times kl_coef have their optimum an eighth of a nat from the reference."""


@dataclass(frozen=True)
class Targets:
    """The targets of an update."""

    batch: TrainingBatch
    value_units: ValueUnits  # of the values in the batch
    step_scale: float  # factor of the policy's learning rate, above 0 and at most 1


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
) -> Targets:
    """Compute the log-probs, values, rewards, advantages and returns of a batch.

    The mask excludes dropped responses and, with group baselines, all responses of their group.

    Args:
        token_scores: shaped scores [B, T].
        trust_sampler: take the log-probs of the sampler instead of computing them again.
    """
    rollouts, groups = scored.rollouts, algorithm.compares_groups
    analysis, ref_logprobs = _analyze_both(actor_critic, reference, rollouts, settings, not trust_sampler)
    ref_logprobs = without_rounding(ref_logprobs, analysis.logprobs)
    kl = kl_estimate(analysis.logprobs, ref_logprobs, settings.kl_estimator)
    counted = rollouts.response_mask & _keep_full_groups(scored.kept, settings.group_size if groups else 1).unsqueeze(1)
    credit = _credit(token_scores, kl, kl_coef, rollouts, settings)
    units = actor_critic.value_units
    if groups:
        credit = replace(credit, usual_deviation=usual_deviation(credit, counted, world))
    if analysis.values is not None and analysis.final_values is not None:
        cut = rollouts.truncated * (settings.truncation == "bootstrap")
        credit = replace(credit, values=analysis.values, final_values=analysis.final_values * cut)
        credit, units = centre_values(credit, cut, units, counted, world)
    rewards = credit.rewards
    advantages, returns = algorithm.advantages(credit)
    if not groups:  # group baselines remove rounding themselves, and their advantages may have another unit
        advantages = zero_if_rounding(advantages, rewards, credit.values)
    if analysis.values is not None:
        returns = advantages + credit.values
    if settings.whiten_advantages and algorithm.whitens:
        advantages = whiten(advantages, counted, world.sum)
    batch = TrainingBatch(
        prompt_tokens=rollouts.prompt_tokens,
        prompt_mask=rollouts.prompt_mask,
        response_tokens=rollouts.response_tokens,
        response_mask=counted,
        logprobs=analysis.logprobs,
        weights=_correction(analysis.logprobs, rollouts, settings.correction_cap),
        ref_logprobs=ref_logprobs,
        values=credit.values,
        rewards=rewards,
        advantages=zero_outside(advantages, counted),
        returns=returns,
    )
    step_scale = _step_scale(credit, kl_coef, groups, counted, world) if settings.kl_in == "reward" else 1.0
    return Targets(batch, units, step_scale)


def _credit(token_scores: Tensor, kl: Tensor, kl_coef: float, rollouts: Rollouts, settings: TargetSettings) -> Credit:
    """Build the inputs of the advantages, with values of zero. token_scores, kl [B, T]"""
    return Credit(
        token_scores=token_scores,
        kl=kl,
        kl_coef=kl_coef if settings.kl_in == "reward" else 0.0,
        values=torch.zeros_like(kl),
        response_mask=rollouts.response_mask,
        final_values=None,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        group_size=settings.group_size,
        normalize_std=settings.normalize_std,
    )


def _correction(logprobs: Tensor, rollouts: Rollouts, cap: float | None) -> Tensor:
    """Return the weights of the policy loss [B, T]: exactly 1 where sampler and trainer differ by rounding only."""
    return truncated_importance_weights(logprobs, without_rounding(rollouts.logprobs, logprobs), cap)


def centre_values(
    credit: Credit, cut: Tensor, units: ValueUnits, counted: Tensor, world: World
) -> tuple[Credit, ValueUnits]:
    """Shift the values by their mean error over the batch. Return also the units that shift later values as much.

    The critic's weights would otherwise have to learn a constant c of the reward. Until then, GAE advantages have a
    trend over positions, A_t = c (gamma lambda)^(T - t). Whitening scales this trend to size one, and the scores are
    lost in it. A baseline that is constant over the batch removes the trend. It does not depend on the response, so
    the mean gradient is unchanged except for a share of 1 / B (each response is part of the baseline).

    The unit of the value loss is the largest deviation of the returns of a batch so far.

    Args:
        cut: [B], the responses whose return ends in the critic's value. An offset raises that value with the others,
            so these responses have no information about the offset.
    """
    error, returns = gae(
        credit.rewards,
        credit.values,
        credit.response_mask,
        credit.gamma,
        gae_lambda=1.0,
        bootstrap_values=credit.final_values,
    )
    shift, _ = all_rank_moments(error, counted & ~cut.bool().unsqueeze(1), world)
    units = replace(units, offset=units.offset + float(shift))
    deviation = float(all_rank_moments(returns, counted, world)[1]) ** 0.5
    if units.deviation is not None:
        units = replace(units, deviation=max(units.deviation, deviation))
    elif scores_vary(credit.token_scores.sum(1), counted.any(1), world):
        # A new head starts at zero: all values are equal.
        is_new_head = not float(all_rank_moments(credit.values, counted, world)[1])
        units = replace(units, deviation=deviation, gain=deviation if is_new_head else units.gain)
    assert credit.final_values is not None
    values = zero_outside(credit.values + shift, credit.response_mask)
    return replace(credit, values=values, final_values=credit.final_values + shift * cut), units


def usual_deviation(credit: Credit, counted: Tensor, world: World) -> float:
    """Return the root mean square, over the groups of all ranks, of the deviation of a group's scores."""
    deviations = group_deviations(credit.token_scores.sum(1), credit.group_size)
    is_full = counted.any(1).view(-1, credit.group_size).all(1)
    return float(all_rank_moments(deviations**2, is_full, world)[0]) ** 0.5


def _step_scale(credit: Credit, kl_coef: float, groups: bool, counted: Tensor, world: World) -> float:
    """Return the factor of the learning rate for the scores and the KL of this batch."""
    kept = counted.any(1)
    kl, _ = all_rank_moments(credit.kl.sum(1), kept, world)
    _, variance = all_rank_moments(credit.token_scores.sum(1), kept, world)
    if groups:  # only differences within a group give a gradient
        return signal_share(credit.usual_deviation**2, kl_coef * float(kl), kl_coef)
    return signal_share(float(variance), kl_coef * float(kl), kl_coef)


def signal_share(variance: float, paid: float, kl_coef: float) -> float:
    """Return the factor of the learning rate, d / sqrt(d^2 + (0.5 kl_coef)^2), d^2 = Var(scores) + (kl_coef KL)^2.

    Rewards and kl_coef have the same unit: kl_coef is the price of a nat. Scores with deviation d have their optimum
    about (d / kl_coef)^2 / 2 nats from the reference. Whitening and AdamW make a full-size step of any differences. If
    the optimum is very close and the policy is not further away, that step would be noise. AdamW divides gradients by
    their size, so the learning rate has to be scaled instead.

    Args:
        variance: of the scores.
        paid: kl_coef times the mean KL of a response.
    """
    signal = variance + paid**2
    return (signal / (signal + (LEAST_NATS * kl_coef) ** 2)) ** 0.5 if signal else 1.0


def scores_vary(scores: Tensor, counted: Tensor, world: World) -> bool:
    """Return whether the scores [B] differ by more than rounding."""
    mean, variance = all_rank_moments(scores, counted, world)
    return float(variance) ** 0.5 > ROUNDING * abs(float(mean))


def zero_if_rounding(advantages: Tensor, rewards: Tensor, values: Tensor) -> Tensor:
    """Set advantages to exact zero that are rounding of the rewards and values they were computed from. [B, T]

    The optimizer would otherwise make a full-size step of them.
    """
    largest = torch.maximum(rewards.abs(), values.abs()).amax(1, keepdim=True)
    return advantages.masked_fill(advantages.abs() <= ROUNDING * largest, 0.0)


def _analyze_both(
    actor_critic: ActorCritic,
    reference: ActorCritic | None,
    rollouts: Rollouts,
    settings: TargetSettings,
    with_logprobs: bool,
) -> tuple[Analysis, Tensor]:
    """Return the analysis by policy and critic, and the log-probs [B, T] under the reference.

    Without a reference, the policy's log-probs take their place.
    """
    arguments = rollouts, settings.temperature, settings.microbatch_tokens
    sampled = None if with_logprobs else actor_critic.sampled_analysis(rollouts)
    if sampled is not None:
        return sampled, sampled.logprobs if reference is None else reference_logprobs(reference, *arguments)
    analyze = partial(analyze_all, actor_critic, *arguments, with_logprobs=with_logprobs)
    if reference is None:
        analysis = analyze()
        return analysis, analysis.logprobs
    analyze_reference = partial(reference_logprobs, reference, *arguments)
    if reference.policy is actor_critic.policy:  # the same base with and without its adapter: not at the same time
        return analyze(), analyze_reference()
    analysis, ref_logprobs = run_concurrently(analyze, analyze_reference)
    return analysis, ref_logprobs


def reference_logprobs(
    reference: ActorCritic, rollouts: Rollouts, temperature: float, microbatch_tokens: int
) -> Tensor:
    """Return the log-probs of the response tokens under the reference. -> [B, T]

    The reference is a frozen copy, or the policy without its adapter.
    """
    with gathered_weights(reference.policy), without_adapter(reference.policy):
        return analyze_all(reference, rollouts, temperature, microbatch_tokens, with_values=False).logprobs


@torch.no_grad()
def analyze_all(
    actor_critic: ActorCritic,
    rollouts: Rollouts | TrainingBatch,
    temperature: float,
    microbatch_tokens: int,
    with_values: bool = True,
    with_logprobs: bool = True,
) -> Analysis:
    """Analyze a batch in micro-batches of rows of similar length, without gradients. Every process must call it."""
    if with_values and with_logprobs and actor_critic.critic is not None and is_sharded(actor_critic.policy):
        analyze = partial(analyze_all, actor_critic, rollouts, temperature, microbatch_tokens)
        by_policy, by_critic = analyze(with_values=False), analyze(with_logprobs=False)  # one is gathered at a time
        return replace(by_policy, values=by_critic.values, final_values=by_critic.final_values)
    lengths = (rollouts.prompt_mask.sum(1) + rollouts.response_mask.sum(1)).tolist()
    shape, device = rollouts.response_mask.shape, rollouts.response_mask.device
    dtype = torch.promote_types(next(actor_critic.policy.parameters()).dtype, torch.float32)
    logprobs, entropy, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))
    final_values = torch.zeros(shape[0], dtype=dtype, device=device)
    has_values = with_values and actor_critic.has_critic
    with gathered_weights(*actor_critic.models_read(with_values, with_logprobs)):
        for rows in microbatches(lengths, microbatch_tokens):
            part = select_rows(rollouts, rows)
            analysis = actor_critic.analyze(part, temperature, with_values=with_values, with_logprobs=with_logprobs)
            index, width = torch.tensor(rows, device=device), part.response_mask.shape[1]
            logprobs[index, :width], entropy[index, :width] = analysis.logprobs, analysis.entropy
            if analysis.values is not None and analysis.final_values is not None:
                values[index, :width], final_values[index] = analysis.values, analysis.final_values
    return Analysis(logprobs, entropy, values if has_values else None, final_values if has_values else None)


def all_rank_moments(x: Tensor, mask: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the counted entries of all ranks; zeros if no rank counts an entry."""
    return masked_moments(x, mask, world.sum)


def _keep_full_groups(kept: Tensor, group_size: int) -> Tensor:
    """Keep the responses of groups in which every response was scored. [B] -> [B]"""
    return kept.view(-1, group_size).all(1).repeat_interleave(group_size)
