"""Policy learning: the loop of `keel train`. It reads as the method in docs/algorithms.md."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from keel.config import DecodingSettings, TrainConfig, parse
from keel.core.kl import updated_kl_coef
from keel.data.batches import ScoredRollouts
from keel.errors import ConfigError, Diverged, RewardError
from keel.learn.shaping import ScoreStatistics, scores_of_kept
from keel.learn.targets import build_targets
from keel.models.loading import as_classifier, save_model
from keel.run.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from keel.run.folder import RunFolder
from keel.train.check import check_moved, fingerprint, self_check
from keel.train.evaluate import judge
from keel.train.record import open_records, rollout_rows, step_metrics
from keel.train.sample import Player
from keel.train.setup import Parts, build_parts
from keel.world import World


@dataclass
class RunState:
    """What changes from step to step besides weights and moments; random streams depend on the step alone."""

    step: int
    kl_coef: float
    statistics: ScoreStatistics = field(default_factory=ScoreStatistics)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


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
        if checkpoint is not None:
            restore(parts, state, checkpoint)
        elif config.reward.normalize == "reference":
            measure_reference(parts, state)
        with open_records(folder, config, state.step, world) as records:
            while state.step < config.steps:
                metrics, rows = next_step(parts, state, folder)
                if config.evaluate.every and state.step % config.evaluate.every == 0:
                    metrics |= evaluate_now(parts)
                records.log(state.step, metrics, rows)
                if due(state.step, config):
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
        raise


def train_step(parts: Parts, state: RunState) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One collect-and-update step: the policy answers, the scorers judge, the update learns from it."""
    config, world = parts.config, parts.world
    with state.timed("sample"):
        rollouts = parts.respond(state.step)
    with state.timed("score"):
        scored = parts.score(rollouts)
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
        )
    before = fingerprint(parts) if state.step == 1 else None
    with state.timed("update"):
        learned = parts.updater.update(
            batch, state.step, state.kl_coef, config.seed, critic_only=state.step <= config.critic.warmup_steps
        )
    if before is not None and bool(batch.advantages.any()):
        check_moved(before, fingerprint(parts))
    group_size = config.rollout.group_size or 1
    metrics = step_metrics(scored, batch, state.kl_coef, group_size, parts.actor_critic.has_critic, world)
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
    judged = judge(player, parts.reference, parts.scorers, decoding, config.seed, "policy")
    return {f"evaluate/{name}": value for name, value in judged.summary().items()}


def measure_reference(parts: Parts, state: RunState) -> None:
    """Statistics of the scores of the policy's start, for `reward.normalize: reference`."""
    for batch in range(1, 5):
        rollouts = parts.respond(batch, purpose="reference")
        scored = parts.score(rollouts)
        state.statistics.add(scores_of_kept(scored), parts.world)


def due(step: int, config: TrainConfig) -> bool:
    every = config.checkpoint.every
    return step == config.steps or (every > 0 and step % every == 0)


def save(parts: Parts, state: RunState, folder: RunFolder) -> None:
    """A checkpoint of everything the next step depends on, and the policy as a plain model folder."""
    if not parts.world.is_main:
        return
    weights = parts.actor_critic.named_parameters()
    bad = next((name for name, value in weights if not bool(value.isfinite().all())), None)
    if bad is not None:
        raise Diverged(f"weight {bad} is not finite after step {state.step}", fix="lower optim.learning_rate")
    save_checkpoint(
        folder,
        state.step,
        {"kl_coef": state.kl_coef, "statistics": asdict(state.statistics)},
        {"weights": _trained(parts), "optimizer": optimizer_tensors(parts.updater.optimizer)},
        {"policy": lambda path: save_model(parts.actor_critic.policy, parts.tokenizer, path)},
        parts.config.checkpoint.keep,
    )


def _trained(parts: Parts) -> dict[str, torch.Tensor]:
    """The trained weights by name, tied ones once."""
    return {name: value.detach() for name, value in parts.actor_critic.named_parameters() if value.requires_grad}


def restore(parts: Parts, state: RunState, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights, moments and counters back."""
    saved, own = checkpoint.tensors("weights"), _trained(parts)
    if saved.keys() != own.keys():
        raise ConfigError("the checkpoint holds other weights than this model", where=str(checkpoint.path))
    for name, value in own.items():
        value.copy_(saved[name])
    load_optimizer_tensors(parts.updater.optimizer, checkpoint.tensors("optimizer"))
    state.step, state.kl_coef = checkpoint.step, checkpoint.state["kl_coef"]
    state.statistics = ScoreStatistics(**checkpoint.state["statistics"])


def save_result(parts: Parts, folder: RunFolder) -> None:
    """The trained policy, and the critic as a sequence classifier, in plain transformers folders."""
    if not parts.world.is_main:
        return
    models = parts.actor_critic
    save_model(models.policy, parts.tokenizer, folder.policy)
    if models.has_critic:
        critic = models.critic
        if critic is None:
            critic = as_classifier(models.policy, models.value_head, parts.tokenizer.pad_token_id)
        save_model(critic, parts.tokenizer, folder.critic)
