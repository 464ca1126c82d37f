"""Policy learning: the loop of `keel train`. It reads as the method in docs/algorithms.md."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from keel.config import AlgorithmSettings, DecodingSettings, TrainConfig, parse
from keel.core.kl import updated_kl_coef
from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.errors import Diverged, Interrupted, RewardError
from keel.failpoints import failpoint
from keel.interrupts import held, interruptible, sealed, waiting, watched
from keel.learn.shaping import ScoreStatistics, scores_of_kept
from keel.learn.targets import build_targets
from keel.run.checkpoint import latest_checkpoint
from keel.run.folder import RunFolder
from keel.run.origin import check_origin
from keel.train.check import check_moved, fingerprint, self_check
from keel.train.evaluate import judge
from keel.train.evidence import keep_evidence
from keel.train.record import Records, open_records, rollout_rows, step_metrics
from keel.train.sample import Player
from keel.train.setup import Parts, build_parts
from keel.train.state import RunState, StepRecord, restore, save, save_result
from keel.world import World

ResultT = TypeVar("ResultT")

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
    with watched():
        parts = build_parts(config, scorers, prompts, world)
        failpoint("start.loaded")
        if check_only:
            return self_check(parts)
        with open_folder(config, resume, world) as folder:
            state, metrics = start(parts, folder, resume)
            with open_records(folder, config, state.logged, world) as records, held() if world.size == 1 else sealed():
                while state.step < config.steps or state.unlogged:
                    if state.unlogged is None:
                        experience = or_save(collect, parts, state, folder)
                        state.unlogged = learn_or_tell(parts, state, experience, folder)
                    metrics = finish_step(parts, state, folder, records)
            save_result(parts, folder)
    return metrics


def sources(config: TrainConfig) -> list[str | None]:
    """Every file and folder that the run reads."""
    functions = [reward.function.rpartition(":")[0] for reward in config.rewards if reward.function]
    models = [config.policy.model, config.reference, config.critic.init, *(reward.model for reward in config.rewards)]
    return [*models, *functions, config.prompts.path]


def start(parts: Parts, folder: RunFolder, resume: bool) -> tuple[RunState, dict[str, float]]:
    """The state that the run goes on from, and what the self-check measured."""
    config = parts.config
    state = RunState(step=0, kl_coef=config.algorithm.kl_coef)
    checkpoint = latest_checkpoint(folder) if resume else None
    metrics = self_check(parts)
    state.trust_sampler = metrics["check/logprob_gap"] <= TRUSTED_GAP
    if checkpoint is not None:
        restore(parts, state, checkpoint)
        failpoint("start.resumed")
    elif config.reward.normalize == "reference":
        state.statistics = reference_statistics(parts)
    return state, metrics


@contextmanager
def open_folder(config: TrainConfig, resume: bool, world: World) -> Iterator[RunFolder]:
    """The run folder, locked by the main rank alone; the other ranks only read in it, once it has been accepted."""
    folder = RunFolder(config.output)
    if world.is_main:
        folder = RunFolder.open(config.output, config.model_dump(mode="json"), resume)
        check_origin(folder, sources(config), world.size, resume)
    world.barrier()
    try:
        yield folder
    finally:
        folder.close()


@dataclass(frozen=True)
class Experience:
    """What a step learns from."""

    scored: ScoredRollouts
    batch: TrainingBatch
    statistics: ScoreStatistics


def or_save(job: Callable[[Parts, RunState], ResultT], parts: Parts, state: RunState, folder: RunFolder) -> ResultT:
    """The result of a job that changes nothing. When a signal ends the run here, or a scorer fails for good, nothing
    but the job is lost: what was done is in a checkpoint."""
    world = parts.world
    try:
        if world.size > 1:  # only here, so that all of them stop together
            stop_together(world)
            return job(parts, state)
        with interruptible():
            return job(parts, state)
    except (RewardError, Interrupted):
        if state.step > 0:
            save(parts, state, folder)
        world.barrier()  # no process ends while the main one still writes
        raise


def stop_together(world: World) -> None:
    asked = waiting()
    if float(world.sum(torch.tensor(float(asked is not None), device=world.device))) > 0:
        raise Interrupted(asked or "a signal to another process")


def finish_step(parts: Parts, state: RunState, folder: RunFolder, records: Records) -> dict[str, float]:
    """Evaluate if it is time, write down what the step found, save if it is time. Returns the step's metrics."""
    assert state.unlogged is not None
    metrics, rows = state.unlogged
    if evaluation_due(state.step, parts.config):
        metrics = metrics | or_save(evaluate_now, parts, state, folder)
    failpoint("step.log")
    records.log(state.step, metrics, rows)
    state.unlogged = None
    if checkpoint_due(state.step, parts.config):
        save(parts, state, folder)
    return metrics


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
        scored = together(parts.world, partial(parts.score, rollouts))
    statistics = state.statistics
    if parts.config.reward.normalize == "running":
        statistics = statistics.plus(scores_of_kept(scored), parts.world)
    with state.timed("targets"):
        failpoint("step.targets")
        batch = build_targets(
            scored,
            parts.shaping.token_scores(scored, statistics),
            parts.actor_critic,
            parts.reference,
            parts.algorithm,
            parts.targets,
            state.kl_coef,
            parts.world,
            state.trust_sampler,
        )
    return Experience(scored, batch, statistics)


def learn_or_tell(parts: Parts, state: RunState, found: Experience, folder: RunFolder) -> StepRecord:
    """The update; the batch of one that went wrong is kept to be looked at."""

    def tell(what: str) -> str:
        return keep_evidence(folder, parts.world, step, found.scored, found.batch, what)

    step = state.step + 1
    try:
        check_finite(found.batch, parts.world)
        check_alive(found.batch, parts.config.algorithm, parts.world)
        metrics, rows = learn(parts, state, found)
    except Diverged as error:
        raise Diverged(error.what, f"step {step}{tell(error.what)}", error.fix) from error
    if metrics["update/skipped"]:
        tell(f"{metrics['update/skipped']:.0%} of the step's updates were skipped")
    return metrics, rows


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


def learn(parts: Parts, state: RunState, found: Experience) -> StepRecord:
    """Update the weights and, when that is done, the state. Returns the step's metrics and some of its answers."""
    config, world, scored, batch = parts.config, parts.world, found.scored, found.batch
    step = state.step + 1
    before = fingerprint(parts) if step == 1 else None
    with state.timed("update"):
        failpoint("step.update")
        learned = parts.updater.update(
            batch, step, state.kl_coef, config.seed, critic_only=step <= config.critic.warmup_steps
        )
    if before is not None and bool(batch.advantages.any()) and learned["update/skipped"] < 1:
        check_moved(before, fingerprint(parts))
    group_size = config.rollout.group_size or 1
    has_critic, has_reference = parts.actor_critic.has_critic, parts.reference is not None
    metrics = step_metrics(scored, batch, state.kl_coef, group_size, has_critic, has_reference, world)
    state.step, state.statistics = step, found.statistics
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


def evaluate_now(parts: Parts, state: RunState) -> dict[str, float]:
    """Figures of the policy as it is, one answer to each held-out prompt, with the same random numbers every time.

    The main rank finds them; the others wait.
    """
    return together(parts.world, lambda: evaluate_held_out(parts) if parts.world.is_main else {})


def evaluate_held_out(parts: Parts) -> dict[str, float]:
    failpoint("step.evaluate")
    config = parts.config
    player = Player("policy", parts.actor_critic, parts.tokenizer, parts.end_ids, parts.held_out)
    decoding = DecodingSettings(
        batch_size=config.rollout.batch_size,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
    )
    judged = judge(player, parts.reference, parts.score, decoding, config.seed, "policy")
    return {f"evaluate/{name}": value for name, value in judged.summary().items()}


def reference_statistics(parts: Parts) -> ScoreStatistics:
    """Statistics of the scores of the policy's start, for `reward.normalize: reference`."""
    statistics = ScoreStatistics()
    for batch in range(1, 5):
        rollouts = parts.respond(batch, purpose="reference")
        scored = together(parts.world, partial(parts.score, rollouts))
        statistics = statistics.plus(scores_of_kept(scored), parts.world)
    return statistics


def evaluation_due(step: int, config: TrainConfig) -> bool:
    return config.evaluate.every > 0 and step % config.evaluate.every == 0


def checkpoint_due(step: int, config: TrainConfig) -> bool:
    every = config.checkpoint.every
    return step == config.steps or (every > 0 and step % every == 0)
