"""One collect-and-update step of policy learning. It reads as the method in docs/algorithms.md."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from keel.config import AlgorithmSettings, TrainConfig
from keel.core.diagnostics import approx_kl
from keel.core.kl import updated_kl_coef
from keel.data.batches import ScoredRollouts, TrainingBatch, select_rows
from keel.errors import Diverged, RewardError
from keel.failpoints import failpoint
from keel.learn.shaping import ScoreStatistics, scores_of_kept
from keel.learn.targets import analyze_all, build_targets
from keel.learn.totals import Totals
from keel.models.actor_critic import ValueUnits
from keel.training.self_check import check_moved, fingerprint
from keel.training.metrics import step_metrics
from keel.training.record import rollout_rows
from keel.training.setup import Parts
from keel.training.state import RunState, StepRecord
from keel.world import World

ResultT = TypeVar("ResultT")

READ_AGAIN = 8
"""Answers that are read once more after the update: a few percent of its time at most."""


@dataclass(frozen=True)
class Experience:
    """What a step learns from."""

    scored: ScoredRollouts
    token_scores: Tensor  # [B, T], shaped
    batch: TrainingBatch
    value_units: ValueUnits
    step_scale: float
    statistics: ScoreStatistics


def train_step(parts: Parts, state: RunState) -> StepRecord:
    """One collect-and-update step: the policy answers, the scorers judge, the update learns from it."""
    return learn(parts, state, collect(parts, state))


def collect(parts: Parts, state: RunState) -> Experience:
    """Answers to the next step's prompts, their scores, and what the update aims at. Changes nothing."""
    with state.timed("sample"):
        failpoint("step.sample")
        rollouts = parts.respond(state.step + 1)
    with state.timed("score"):
        failpoint("step.score")
        scored = together(parts.world, partial(parts.score, rollouts, state.step))
    statistics = state.statistics
    if parts.config.reward.normalize == "running":
        statistics = statistics.plus(scores_of_kept(scored), parts.world)
    with state.timed("targets"):
        failpoint("step.targets")
        token_scores = parts.shaping.token_scores(scored, statistics)
        targets = build_targets(
            scored,
            token_scores,
            parts.actor_critic,
            parts.reference,
            parts.algorithm,
            parts.targets,
            state.kl_coef,
            parts.world,
            state.trust_sampler,
        )
    return Experience(scored, token_scores, targets.batch, targets.value_units, targets.step_scale, statistics)


def learn(parts: Parts, state: RunState, found: Experience) -> StepRecord:
    """Update the weights and, when that is done, the state. Returns the step's metrics and some of its answers."""
    config, scored, batch = parts.config, found.scored, found.batch
    step = state.step + 1
    before = fingerprint(parts) if step == 1 else None
    parts.actor_critic.value_units = found.value_units
    with state.timed("update"):
        failpoint("step.update")
        step_scale = 0.0 if step <= config.critic.warmup_steps else found.step_scale
        learned = parts.updater.update(batch, step, state.kl_coef, config.seed, step_scale)
    if before is not None and bool(batch.advantages.any()) and learned["update/skipped"] < 1:
        check_moved(before, fingerprint(parts))
    metrics = step_metrics(parts, scored, found.token_scores, batch, state.kl_coef)
    new_logprobs, moved = after_update(parts, found)
    before_moving = learned.pop("policy/first_approx_kl")
    metrics["sampler/approx_kl"] += before_moving if isfinite(before_moving) else 0.0  # the first update may be skipped
    state.step, state.statistics = step, found.statistics
    if config.algorithm.target_kl is not None:
        state.kl_coef = updated_kl_coef(
            state.kl_coef,
            metrics["objective/kl"],
            config.algorithm.target_kl,
            config.algorithm.kl_horizon,
            config.rollout.batch_size,
        )
    metrics |= learned | moved | {"policy/step_scale": step_scale} | speed(state, scored, config)
    return metrics, list(rollout_rows(scored, batch, config.log.rollouts_per_step, parts.tokenizer, new_logprobs))


def after_update(parts: Parts, found: Experience) -> tuple[Tensor | None, dict[str, float]]:
    """What the updated policy says of the first few answers, [N, T] on the main rank, and how far the step moved it.

    `policy/approx_kl` is a mean over the epochs, and no measure of the last optimizer step.
    """
    totals, new_logprobs = Totals(["policy/step_kl"]), None
    if parts.world.is_main:
        few = select_rows(found.scored.rollouts, range(min(READ_AGAIN, found.batch.size)))
        rows, width = few.response_mask.shape
        temperature, at_once = parts.targets.temperature, parts.targets.microbatch_tokens
        new_logprobs = analyze_all(parts.actor_critic, few, temperature, at_once, with_values=False).logprobs
        moved = approx_kl(new_logprobs, found.batch.logprobs[:rows, :width])
        totals.add("policy/step_kl", moved[found.batch.response_mask[:rows, :width]])
    return new_logprobs, totals.reduced(parts.world)


def check_finite(batch: TrainingBatch, world: World) -> None:
    """Raises Diverged, on all ranks, when the update would aim at something that is no number."""
    names = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    bad = torch.stack([(~getattr(batch, name).isfinite() & batch.response_mask).any() for name in names])
    bad = world.sum(bad.float()) > 0
    if bool(bad.any()):
        first = names[int(bad.nonzero()[0])]
        raise Diverged(f"the {first} of this batch are not all finite", fix="look at the weights and at the rewards")


def check_alive(batch: TrainingBatch, limits: AlgorithmSettings, world: World) -> None:
    """Raises Diverged, on all ranks, when the answers come from a policy that has collapsed, by the limits set."""
    mask = batch.response_mask
    tokens, answers = world.sum(mask.sum()), world.sum(mask.any(1).sum())
    if not float(tokens):
        return
    kl = float(world.sum((batch.logprobs - batch.ref_logprobs)[mask].double().sum()) / answers)
    entropy = float(-world.sum(batch.logprobs[mask].double().sum()) / tokens)
    if limits.max_kl is not None and kl > limits.max_kl:
        raise Diverged(f"the KL to the reference is {kl:.3g}, above algorithm.max_kl", fix="raise algorithm.kl_coef")
    if limits.min_entropy is not None and entropy < limits.min_entropy:
        raise Diverged(f"the entropy is {entropy:.3g}, below algorithm.min_entropy", fix="raise algorithm.kl_coef")


def together(world: World, job: Callable[[], ResultT]) -> ResultT:
    """This rank's result; a RewardError on any rank is raised on all, so that none waits for it."""
    results, error = [], None
    try:
        results = [job()]
    except RewardError as caught:
        error = caught
    if float(world.sum(torch.tensor(float(error is not None), device=world.device))) > 0:
        raise error or RewardError("a scorer failed in another process", where="rewards")
    return results[0]


def reference_statistics(parts: Parts) -> ScoreStatistics:
    """Statistics of the scores of the policy's start, for `reward.normalize: reference`."""
    statistics = ScoreStatistics()
    for batch in range(1, 5):
        rollouts = parts.respond(batch, purpose="reference")
        scored = together(parts.world, partial(parts.score, rollouts))
        statistics = statistics.plus(scores_of_kept(scored), parts.world)
    return statistics


def speed(state: RunState, scored: ScoredRollouts, config: TrainConfig) -> dict[str, float]:
    """Where the step's time went, and the rates users compare."""
    total = sum(state.seconds.values())
    tokens = float(scored.rollouts.lengths.sum()) * config.rollout.batch_size / len(scored.rollouts.texts)
    return {
        **{f"time/{phase}_seconds": seconds for phase, seconds in state.seconds.items()},
        "time/step_seconds": total,
        "perf/tokens_per_second": tokens / total,
        "perf/responses_per_second": config.rollout.batch_size / total,
        "progress/responses": float(state.step * config.rollout.batch_size),
    }
