"""Policy learning: the loop of `keel train`, which can be ended and taken up again at any step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch

from keel.config import DecodingSettings, TrainConfig, parse
from keel.config.train import CLIPPED
from keel.core.kl import RESOLUTION
from keel.errors import Diverged, Interrupted, RewardError
from keel.failpoints import failpoint
from keel.interrupts import held, interruptible, sealed, waiting, watched
from keel.learn.optim import warmup_warning
from keel.run.checkpoint import checkpoint_to_resume
from keel.run.folder import RunFolder, remove
from keel.run.origin import check_origin
from keel.terminal import tell
from keel.training.self_check import self_check
from keel.evaluation.evaluate import judge
from keel.training.faulty_batch import keep_batch
from keel.training.python_prompts import GIVEN, fingerprint_of, with_place
from keel.training.record import Records, open_records
from keel.evaluation.sample import Player
from keel.training.setup import Parts, build_parts
from keel.training.state import RunState, StepRecord, restore, save, save_result
from keel.training.step import Experience, check_alive, check_finite, collect, learn, reference_statistics, together
from keel.training.watch import stopped
from keel.world import World

ResultT = TypeVar("ResultT")


def train_policy(
    config: TrainConfig | Mapping[str, Any],
    scorers: Sequence[Callable[..., Any]] = (),
    prompts: Any = None,
    resume: bool = False,
    check_only: bool = False,
) -> dict[str, float]:
    """Learn a policy from rewards; the result lies in `config.output`. Returns the last step's metrics.

    `scorers` are Python reward functions besides `config.rewards`; `prompts` replace the file of `config.prompts`: a
    list or a datasets.Dataset of texts, chats, or rows with columns. Raises ConfigError for anything else.
    """
    if not isinstance(config, TrainConfig):
        config = parse(TrainConfig, config if prompts is None else with_place(config))
    world = World.from_environment()
    with watched():
        parts = build_parts(config, scorers, prompts, world)
        failpoint("start.loaded")
        if check_only:
            return self_check(parts)
        given = {} if prompts is None else {GIVEN: fingerprint_of(parts.prompts)}
        with open_folder(config, resume, world, given) as folder:
            state, metrics = start(parts, folder, resume)
            with open_records(folder, config, state.logged, world) as records, held() if world.size == 1 else sealed():
                while state.step < config.steps or state.unlogged:
                    if state.unlogged is None:
                        experience = or_save(collect, parts, state, folder)
                        state.unlogged = learn_or_tell(parts, state, experience, folder)
                    metrics = finish_step(parts, state, folder, records)
            save_result(parts, folder)
            if world.is_main and not config.checkpoint.keep_final:
                remove(folder.checkpoints)
    return metrics


def sources(config: TrainConfig) -> list[str | None]:
    """Every file and folder of data and models that the run reads."""
    models = [config.policy.model, config.reference, config.critic.init, *(reward.model for reward in config.rewards)]
    return [*models, config.prompts.path]


def start(parts: Parts, folder: RunFolder, resume: bool) -> tuple[RunState, dict[str, float]]:
    """The state that the run goes on from, and what the self-check measured."""
    config = parts.config
    state = RunState(step=0, kl_coef=config.algorithm.kl_coef)
    checkpoint = checkpoint_to_resume(folder, partial(say, world=parts.world)) if resume else None
    metrics = self_check(parts)
    state.trust_sampler = metrics["check/logprob_gap"] <= RESOLUTION
    if warning := warmup_warning(config.optim.warmup_steps, config.optimizer_steps):
        say(warning, parts.world)
    if (config.algorithm.minibatch_size or 0) < config.rollout.batch_size and config.algorithm.name not in CLIPPED:
        say(
            f"warning: {config.algorithm.name} has no ratio to the policy that sampled: with algorithm.minibatch_size "
            "below rollout.batch_size all but the first minibatch are off-policy",
            parts.world,
        )
    if checkpoint is not None:
        restore(parts, state, checkpoint)
        failpoint("start.resumed")
    elif config.reward.normalize == "reference":
        state.statistics = reference_statistics(parts)
    return state, metrics


def say(what: str, world: World) -> None:
    """A line for the person who watches, on standard error."""
    if world.is_main:
        tell(what)


@contextmanager
def open_folder(
    config: TrainConfig, resume: bool, world: World, given: Mapping[str, str] | None = None
) -> Iterator[RunFolder]:
    """The run folder, locked by the main rank alone; the other ranks only read in it, once it has been accepted.

    `given` are fingerprints of what the run reads and no file holds.
    """
    folder = RunFolder(config.output)
    if world.is_main:
        folder = RunFolder.open(config.output, config.model_dump(mode="json"), resume)
        code = [reward.function.rpartition(":")[0] for reward in config.rewards if reward.function]
        check_origin(folder, [*sources(config), *(given or {}).items()], world.size, resume, code)
    world.barrier()
    try:
        with folder.told() if world.is_main else nullcontext():
            yield folder
    finally:
        folder.close()


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
    except (RewardError, Interrupted) as error:
        if state.step > 0:
            save(parts, state, folder)
            if isinstance(error, RewardError):
                error.fix = f"{error.fix or 'fix it'}, then --resume"
        world.barrier()  # no process ends while the main one still writes
        raise


def any_rank(here: bool, world: World) -> bool:
    """Whether it is so on some rank."""
    return float(world.sum(torch.tensor(float(here), device=world.device))) > 0


def stop_together(world: World) -> None:
    asked = waiting()
    if any_rank(asked is not None, world):
        raise Interrupted(asked or "a signal to another process")


def finish_step(parts: Parts, state: RunState, folder: RunFolder, records: Records) -> dict[str, float]:
    """Evaluate if it is time, write down what the step found, save if it is time. Returns the step's metrics."""
    assert state.unlogged is not None
    metrics, rows = state.unlogged
    if evaluation_due(state.step, parts.config):
        metrics = metrics | or_save(evaluate_now, parts, state, folder)
    failpoint("step.log")
    grave = records.log(state.step, metrics, rows)
    state.unlogged = None
    halt = parts.config.doctor == "stop" and any_rank(grave is not None, parts.world)
    if halt or checkpoint_due(state.step, parts.config):
        save(parts, state, folder)
    if halt:
        parts.world.barrier()
        raise stopped(grave, state.step, folder)
    return metrics


def learn_or_tell(parts: Parts, state: RunState, found: Experience, folder: RunFolder) -> StepRecord:
    """The update; the batch of one that went wrong is kept to be looked at."""

    def tell(what: str) -> str:
        return keep_batch(folder, parts, step, found.scored, found.batch, what)

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


def evaluate_now(parts: Parts, state: RunState) -> dict[str, float]:
    """Figures of the policy as it is, one answer to each held-out prompt, with the same random numbers every time.

    The main rank finds them; the others wait.
    """
    return together(parts.world, lambda: evaluate_held_out(parts) if parts.world.is_main else {})


def evaluate_held_out(parts: Parts) -> dict[str, float]:
    failpoint("step.evaluate")
    config = parts.config
    player = Player("policy", parts.actor_critic, parts.tokenizer, parts.end_ids, parts.held_out, parts.stop_texts)
    decoding = DecodingSettings(
        batch_size=config.rollout.batch_size,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        stop_in_text=config.rollout.stop_in_text,
    )
    judged = judge(player, parts.reference, parts.score, decoding, config.seed, "policy")
    return {f"evaluate/{name}": value for name, value in judged.summary().items()}


def evaluation_due(step: int, config: TrainConfig) -> bool:
    return config.evaluate.every > 0 and step % config.evaluate.every == 0


def checkpoint_due(step: int, config: TrainConfig) -> bool:
    every = config.checkpoint.every
    return step == config.steps or (every > 0 and step % every == 0)
