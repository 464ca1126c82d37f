"""Policy learning: the loop of `keel train`. It reads as the method in docs/algorithms.md."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from keel.config import DecodingSettings, TrainConfig, parse
from keel.core.kl import updated_kl_coef
from keel.data.batches import Rollouts, ScoredRollouts
from keel.errors import RewardError
from keel.learn.shaping import scores_of_kept
from keel.learn.targets import build_targets
from keel.run.checkpoint import latest_checkpoint
from keel.run.folder import RunFolder
from keel.train.check import check_moved, fingerprint, self_check
from keel.train.evaluate import judge
from keel.train.record import open_records, rollout_rows, step_metrics
from keel.train.sample import Player
from keel.train.setup import Parts, build_parts
from keel.train.state import RunState, restore, save, save_result
from keel.world import World

TRUSTED_GAP = 1e-4
"""Up to this difference of a token's log-probability the sampler's log-probs serve as the trainer's."""


def train_policy(
    config: TrainConfig | Mapping[str, Any],
    scorers: Sequence[Callable[..., Any]] = (),
    prompts: Sequence[Any] | None = None,
    resume: bool = False,
    check_only: bool = False,
) -> dict[str, float]:
    """Learn a policy from rewards; the result lies in `config.output`. Returns the last step's metrics.

    `scorers` are Python reward functions besides `config.rewards`; `prompts` (text or chats) replace `config.prompts`.
    """
    config = config if isinstance(config, TrainConfig) else parse(TrainConfig, config)
    world = World.from_environment()
    parts = build_parts(config, scorers, prompts, world)
    if check_only:
        return self_check(parts)
    with open_folder(config, resume, world) as folder:
        state = RunState(step=0, kl_coef=config.algorithm.kl_coef)
        checkpoint = latest_checkpoint(folder) if resume else None
        metrics = self_check(parts)
        state.trust_sampler = metrics["check/logprob_gap"] <= TRUSTED_GAP
        if checkpoint is not None:
            restore(parts, state, checkpoint)
        elif config.reward.normalize == "reference":
            measure_reference(parts, state)
        with open_records(folder, config, state.step, world) as records:
            while state.step < config.steps:
                metrics, rows = next_step(parts, state, folder)
                if evaluation_due(state.step, config) and world.is_main:
                    metrics |= evaluate_now(parts)
                records.log(state.step, metrics, rows)
                if checkpoint_due(state.step, config):
                    save(parts, state, folder)
        save_result(parts, folder)
    return metrics


@contextmanager
def open_folder(config: TrainConfig, resume: bool, world: World) -> Iterator[RunFolder]:
    """The run folder, locked by the main rank alone; the other ranks only read in it, once it has been accepted."""
    folder = RunFolder(config.output)
    if world.is_main:
        folder = RunFolder.open(config.output, config.model_dump(mode="json"), resume)
    world.barrier()
    try:
        yield folder
    finally:
        folder.close()


def next_step(parts: Parts, state: RunState, folder: RunFolder) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Take one more step. When a scorer fails for good, no finished step is lost: they are in a checkpoint."""
    state.step += 1
    try:
        return train_step(parts, state)
    except RewardError:
        state.step -= 1
        if state.step > 0:
            save(parts, state, folder)
        parts.world.barrier()  # no process ends while the main one still writes
        raise


def train_step(parts: Parts, state: RunState) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One collect-and-update step: the policy answers, the scorers judge, the update learns from it."""
    config, world = parts.config, parts.world
    with state.timed("sample"):
        rollouts = parts.respond(state.step)
    with state.timed("score"):
        scored = score_together(parts, rollouts)
    if config.reward.normalize == "running":
        state.statistics.add(scores_of_kept(scored), world)
    with state.timed("targets"):
        token_scores = parts.shaping.token_scores(scored, state.statistics)
        batch = build_targets(
            scored,
            token_scores,
            parts.actor_critic,
            parts.reference,
            parts.algorithm,
            parts.targets,
            state.kl_coef,
            world,
            state.trust_sampler,
        )
    before = fingerprint(parts) if state.step == 1 else None
    with state.timed("update"):
        learned = parts.updater.update(
            batch, state.step, state.kl_coef, config.seed, critic_only=state.step <= config.critic.warmup_steps
        )
    if before is not None and bool(batch.advantages.any()):
        check_moved(before, fingerprint(parts))
    group_size = config.rollout.group_size or 1
    has_critic, has_reference = parts.actor_critic.has_critic, parts.reference is not None
    metrics = step_metrics(scored, batch, state.kl_coef, group_size, has_critic, has_reference, world)
    if config.algorithm.target_kl is not None:
        state.kl_coef = updated_kl_coef(
            state.kl_coef,
            metrics["objective/kl"],
            config.algorithm.target_kl,
            config.algorithm.kl_horizon,
            config.rollout.batch_size,
        )
    metrics |= learned | speed(state, scored, config)
    return metrics, list(rollout_rows(scored, batch, config.log.rollouts_per_step))


def score_together(parts: Parts, rollouts: Rollouts) -> ScoredRollouts:
    """Scores of this rank's answers; a RewardError on any rank is raised on all, so that none waits for it."""
    scored, error = None, None
    try:
        scored = parts.score(rollouts)
    except RewardError as caught:
        error = caught
    failures = parts.world.sum(torch.tensor(float(error is not None), device=parts.world.device))
    if scored is None or failures > 0:
        raise error or RewardError("a scorer failed in another process", where="rewards")
    return scored


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


def evaluate_now(parts: Parts) -> dict[str, float]:
    """Figures of the policy as it is, one answer to each held-out prompt, with the same random numbers every time."""
    config = parts.config
    player = Player("policy", parts.actor_critic, parts.tokenizer, parts.end_ids, parts.held_out)
    decoding = DecodingSettings(
        batch_size=config.rollout.batch_size,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
    )
    judged = judge(player, parts.reference, parts.score, decoding, config.seed, "policy")
    return {f"evaluate/{name}": value for name, value in judged.summary().items()}


def measure_reference(parts: Parts, state: RunState) -> None:
    """Statistics of the scores of the policy's start, for `reward.normalize: reference`."""
    for batch in range(1, 5):
        rollouts = parts.respond(batch, purpose="reference")
        scored = score_together(parts, rollouts)
        state.statistics.add(scores_of_kept(scored), parts.world)


def evaluation_due(step: int, config: TrainConfig) -> bool:
    return config.evaluate.every > 0 and step % config.evaluate.every == 0


def checkpoint_due(step: int, config: TrainConfig) -> bool:
    every = config.checkpoint.every
    return step == config.steps or (every > 0 and step % every == 0)
