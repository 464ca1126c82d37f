"""ScoredRollouts -> TrainingBatch: everything the update aims at, computed once with the weights that sampled."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from keel.core.advantages import ROUNDING, gae, group_deviations
from keel.core.kl import kl_estimate, without_rounding
from keel.core.masked import apply_whitening, masked_sum, zero_outside
from keel.data.batches import Rollouts, ScoredRollouts, TrainingBatch, select_rows
from keel.learn.algorithms import Algorithm, Credit
from keel.learn.optim import microbatches
from keel.models.actor_critic import ActorCritic, Analysis, ValueUnits, without_adapter
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
    normalize_std: bool
    truncation: str


LEAST_NATS = 0.5
"""Scores of a deviation of so many kl_coef have their optimum an eighth of a nat from the reference."""


@dataclass(frozen=True)
class Targets:
    """What the update aims at, the units of the values in it, and how far the policy may move for it."""

    batch: TrainingBatch
    value_units: ValueUnits
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
    """Log-probs, values, rewards, advantages and returns of a batch; `token_scores` [B, T] are the shaped scores.

    With `trust_sampler` the log-probs are those that the sampler gave, and not computed once more.
    Dropped responses (and with group baselines their whole group) leave the mask.
    """
    rollouts, groups = scored.rollouts, algorithm.compares_groups
    analysis, ref_logprobs = _own_and_reference(actor_critic, reference, rollouts, settings, not trust_sampler)
    ref_logprobs = without_rounding(ref_logprobs, analysis.logprobs)
    kl = kl_estimate(analysis.logprobs, ref_logprobs, settings.kl_estimator)
    counted = rollouts.response_mask & _kept(scored.kept, settings.group_size if groups else 1).unsqueeze(1)
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
    if not groups:  # whose scores are compared, and may be normalised, in units of their own
        advantages = zero_if_rounding(advantages, rewards, credit.values)
    if analysis.values is not None:
        returns = advantages + credit.values
    if settings.whiten_advantages and not groups:
        advantages = whiten_all(advantages, counted, world)
    batch = TrainingBatch(
        prompt_tokens=rollouts.prompt_tokens,
        prompt_mask=rollouts.prompt_mask,
        response_tokens=rollouts.response_tokens,
        response_mask=counted,
        logprobs=analysis.logprobs,
        ref_logprobs=ref_logprobs,
        values=credit.values,
        rewards=rewards,
        advantages=zero_outside(advantages, counted),
        returns=returns,
    )
    step_scale = _step_scale(credit, kl_coef, groups, counted, world) if settings.kl_in == "reward" else 1.0
    return Targets(batch, units, step_scale)


def _credit(token_scores: Tensor, kl: Tensor, kl_coef: float, rollouts: Rollouts, settings: TargetSettings) -> Credit:
    """What the advantages are computed of, before there are values. token_scores, kl [B, T]"""
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


def centre_values(
    credit: Credit, cut: Tensor, units: ValueUnits, counted: Tensor, world: World
) -> tuple[Credit, ValueUnits]:
    """Shift the values by their mean error over the batch, and return the units that do so for the values to come.

    A constant of the reward would otherwise have to be learned by the critic's weights. Until it is, it leaves in the
    advantages of GAE a trend over positions, A_t = c (gamma lambda)^(T - t), which whitening makes one of size one
    and in which the scores are lost. A baseline that is constant over the batch takes it out; as it does not depend on
    the response, the gradient has the same mean, but for a share of 1 / B (each response is part of its own baseline).
    `cut` [B] are the responses that the critic's value follows: an offset raises it with the others, so they say
    nothing of the offset. The unit of the loss is the largest deviation that the returns of a batch have had.
    """
    error, returns = gae(
        credit.rewards,
        credit.values,
        credit.response_mask,
        credit.gamma,
        gae_lambda=1.0,
        bootstrap_values=credit.final_values,
    )
    shift, _ = moments(error, counted & ~cut.bool().unsqueeze(1), world)
    units = replace(units, offset=units.offset + float(shift))
    deviation = float(moments(returns, counted, world)[1]) ** 0.5
    if units.deviation is not None:
        units = replace(units, deviation=max(units.deviation, deviation))
    elif scores_vary(credit.token_scores.sum(1), counted.any(1), world):
        fresh = not float(moments(credit.values, counted, world)[1])
        units = replace(units, deviation=deviation, gain=deviation if fresh else units.gain)
    assert credit.final_values is not None
    values = zero_outside(credit.values + shift, credit.response_mask)
    return replace(credit, values=values, final_values=credit.final_values + shift * cut), units


def usual_deviation(credit: Credit, counted: Tensor, world: World) -> float:
    """Root mean square, over the groups of all ranks, of the deviation of a group's scores."""
    deviations = group_deviations(credit.token_scores.sum(1), credit.group_size)
    whole = counted.any(1).view(-1, credit.group_size).all(1)
    return float(moments(deviations**2, whole, world)[0]) ** 0.5


def _step_scale(credit: Credit, kl_coef: float, groups: bool, counted: Tensor, world: World) -> float:
    """Factor of the learning rate for the scores and the KL of this batch."""
    whole = counted.any(1)
    kl, _ = moments(credit.kl.sum(1), whole, world)
    _, variance = moments(credit.token_scores.sum(1), whole, world)
    if groups:  # of which only what differs within them teaches
        return signal_share(credit.usual_deviation**2, kl_coef * float(kl), kl_coef)
    return signal_share(float(variance), kl_coef * float(kl), kl_coef)


def signal_share(variance: float, paid: float, kl_coef: float) -> float:
    """d / sqrt(d^2 + (0.5 kl_coef)^2), d^2 = Var(scores) + (kl_coef mean KL)^2: the factor of the learning rate.

    `paid` is kl_coef times the mean KL of a response. Rewards and kl_coef have one unit: kl_coef is the price of a nat.
    Scores of a deviation d have their optimum about (d / kl_coef)^2 / 2 nats from the reference. Where that is next to
    nothing and the policy is not further away, a step of full size, which whitening and AdamW make of any differences,
    would be noise. AdamW divides gradients by their size, so its learning rate has to carry this.
    """
    signal = variance + paid**2
    return (signal / (signal + (LEAST_NATS * kl_coef) ** 2)) ** 0.5 if signal else 1.0


def scores_vary(scores: Tensor, counted: Tensor, world: World) -> bool:
    """Whether the scores [B] differ by more than rounding."""
    mean, variance = moments(scores, counted, world)
    return float(variance) ** 0.5 > ROUNDING * abs(float(mean))


def zero_if_rounding(advantages: Tensor, rewards: Tensor, values: Tensor) -> Tensor:
    """Advantages with those that are no more than rounding of what they are differences of as exact zeros. [B, T]

    The optimizer would make a step of full size of them.
    """
    largest = torch.maximum(rewards.abs(), values.abs()).amax(1, keepdim=True)
    return advantages.masked_fill(advantages.abs() <= ROUNDING * largest, 0.0)


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


def whiten_all(x: Tensor, mask: Tensor, world: World) -> Tensor:
    """`core.masked.whiten` with the statistics of all ranks; what differs from the mean by rounding becomes 0."""
    mean, var = moments(x, mask, world)
    differences = (x - mean).masked_fill((x - mean).abs() <= ROUNDING * mean.abs(), 0.0)
    return apply_whitening(differences, mask, torch.zeros_like(mean), var)


def moments(x: Tensor, mask: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the counted entries of all ranks; zeros when nothing is counted anywhere."""
    count = world.sum(mask.sum()).clamp(min=1)
    mean = world.sum(masked_sum(x, mask)) / count
    mean = mean + world.sum(masked_sum(x - mean, mask)) / count  # takes out the rounding: equal entries have variance 0
    return mean, world.sum(masked_sum((x - mean) ** 2, mask)) / count


def _kept(kept: Tensor, group_size: int) -> Tensor:
    """A response counts only if its whole group was scored. [B] -> [B]"""
    return kept.view(-1, group_size).all(1).repeat_interleave(group_size)
