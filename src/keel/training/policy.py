"""The training loop of `keel train`. It can be interrupted and resumed at any step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from keel.config import DecodingSettings, TrainConfig, parse
from keel.errors import Diverged
from keel.evaluation.evaluate import sample_and_score
from keel.evaluation.evaluated_policy import EvaluatedPolicy
from keel.evaluation.pass_rates import pass_rates
from keel.failpoints import failpoint
from keel.interrupts import interrupts_blocked, interrupts_deferred, interrupts_handled
from keel.learn.optim import warmup_warning
from keel.loop.checkpoints import checkpoint_due, checkpoint_on_error
from keel.loop.open_run import open_run
from keel.models.sharding import gathered_weights
from keel.run.checkpoint import checkpoint_to_resume
from keel.run.folder import RunFolder, delete_path
from keel.terminal import print_line
from keel.training.engine_journal import journal_of_rounds, sample_or_recall, trim_journal
from keel.training.faulty_batch import keep_batch
from keel.training.python_prompts import PYTHON_PROMPTS, prompt_fingerprint, with_place
from keel.training.record import Records, open_records
from keel.training.setup import build_training_setup
from keel.training.state import restore_run_state, save_result, save_run_state
from keel.training.step_metrics import judge_metrics
from keel.training.trainer import PolicyTrainer, StepTargets
from keel.training.watch import halt_error
from keel.world import World


def train_policy(
    config: TrainConfig | Mapping[str, Any],
    scorers: Sequence[Callable[..., Any]] = (),
    prompts: Any = None,
    resume: bool = False,
    check_only: bool = False,
) -> dict[str, float]:
    """Train a policy from rewards, and write the run and its result to `config.output`.

    Args:
        scorers: Python reward functions in addition to `config.rewards`.
        prompts: replace the files of `config.prompts`: a list, a datasets.Dataset or another iterable of texts, chats
            or rows.
        resume: continue the run in `config.output`.
        check_only: run only the self-check.

    Returns the metrics of the last step, or with `check_only` the measurements of the self-check. Raises ConfigError
    for settings or prompts that cannot be used.
    """
    if not isinstance(config, TrainConfig):
        config = parse(TrainConfig, config if prompts is None else with_place(config))
    world = World.from_environment(config.parallel.shard)
    with interrupts_handled():
        trainer = PolicyTrainer(build_training_setup(config, scorers, prompts, world))
        failpoint("start.loaded")
        with closing(trainer):
            return trainer.check() if check_only else _run(trainer, resume, prompts is not None)


def _run(trainer: PolicyTrainer, resume: bool, from_python: bool) -> dict[str, float]:
    """Open the run folder, run all steps and save the result. Return the metrics of the last step.

    Args:
        from_python: whether the prompts were passed as objects, and not read from a file.
    """
    config, world = trainer.setup.config, trainer.setup.world
    given = [(PYTHON_PROMPTS, prompt_fingerprint(trainer.setup.prompts))] if from_python else []
    code = [reward.function.rpartition(":")[0] for reward in config.rewards if reward.function]
    with open_run(config.output, config, [*sources(config), *given], resume, world, code) as folder:
        metrics = start(trainer, folder, resume)
        deferred = interrupts_deferred() if world.size == 1 else interrupts_blocked()
        with open_records(folder, config, trainer.state.num_logged, world) as records, deferred:
            metrics = run_steps(trainer, folder, records) or metrics
        save_result(trainer.setup, folder)
        if world.is_main and not config.checkpoint.keep_final:
            delete_path(folder.checkpoints)
    return metrics


def run_steps(trainer: PolicyTrainer, folder: RunFolder, records: Records) -> dict[str, float]:
    """Run the remaining steps: sample, score, compute targets, update, log, checkpoint. Return the last metrics."""
    config, world, state = trainer.setup.config, trainer.setup.world, trainer.state
    checkpoint, metrics = partial(save_state, trainer, folder), dict[str, float]()
    while state.step < config.steps or state.unlogged:
        if state.unlogged is None:  # otherwise the run was killed between an update and its log line
            with checkpoint_on_error(checkpoint, state.step, world):
                rollouts = sample_or_recall(trainer, folder)
                scored = trainer.resample(trainer.score(rollouts), journal_of_rounds(trainer, folder))
                targets = trainer.compute_targets(scored)
            with batch_kept_on_fault(trainer, targets, folder):
                state.unlogged = trainer.update_weights(targets)
        metrics, rows = state.unlogged
        if config.evaluate.every and state.step % config.evaluate.every == 0:
            with checkpoint_on_error(checkpoint, state.step, world):
                metrics = metrics | evaluate_held_out(trainer)
        failpoint("step.log")
        critical = records.log(state.step, metrics, rows)
        state.unlogged = None
        halt = config.doctor == "stop" and world.any(critical is not None)
        if halt or state.step == config.steps or checkpoint_due(state.step, config.checkpoint.every):
            checkpoint()
        if halt:
            world.barrier()
            raise halt_error(critical, state.step, folder)
    return metrics


def save_state(trainer: PolicyTrainer, folder: RunFolder) -> None:
    """Save a checkpoint. The journal keeps only the responses of later steps."""
    save_run_state(trainer.setup, trainer.state, folder)
    if trainer.setup.engine.is_external:
        trim_journal(folder, trainer.state.step)


def sources(config: TrainConfig) -> list[str | None]:
    """Return every file and folder of data and models that the run reads."""
    models = [config.policy.model, config.reference, config.critic.init, *(reward.model for reward in config.rewards)]
    rubrics = [reward.judge.rubric for reward in config.rewards if reward.judge]
    scores = config.prompts.difficulty.path if config.prompts.difficulty else None
    return [*models, *(file.path for file in config.prompts.files), scores, *rubrics]


def start(trainer: PolicyTrainer, folder: RunFolder, resume: bool) -> dict[str, float]:
    """Run the self-check, warn about settings that probably are mistakes, and restore the newest checkpoint.

    Returns the measurements of the self-check.
    """
    config, world = trainer.setup.config, trainer.setup.world
    checkpoint = checkpoint_to_resume(folder, partial(_tell, world)) if resume else None
    measured = trainer.check()
    if warning := warmup_warning(config.optim.warmup_steps, config.optimizer_steps):
        _tell(world, warning)
    if (config.algorithm.minibatch_size or 0) < config.rollout.batch_size and not config.algorithm.traits.clips_ratio:
        _tell(
            world,
            f"warning: {config.algorithm.name} does not correct for off-policy data: with algorithm.minibatch_size "
            "below rollout.batch_size, all minibatches but the first are off-policy",
        )
    if checkpoint is not None:
        restore_run_state(trainer.setup, trainer.state, checkpoint)
        failpoint("start.resumed")
    else:
        delete_path(folder.responses)
        if config.reward.normalize == "reference":
            trainer.measure_reference()
    return measured


@contextmanager
def batch_kept_on_fault(trainer: PolicyTrainer, targets: StepTargets, folder: RunFolder) -> Iterator[None]:
    """Keep the batch in the run folder if the update in the block diverges or skips optimizer steps."""
    step = trainer.state.step + 1

    def keep(reason: str) -> str:
        return keep_batch(folder, trainer.setup, step, targets.scored, targets.batch, reason)

    try:
        yield
    except Diverged as error:
        raise Diverged(error.what, f"step {step}{keep(error.what)}", error.fix) from error
    skipped = trainer.state.unlogged[0]["update/skipped"] if trainer.state.unlogged else 0.0
    if skipped:
        keep(f"{skipped:.0%} of the step's optimizer steps were skipped")


def evaluate_held_out(trainer: PolicyTrainer) -> dict[str, float]:
    """Evaluate the current policy on responses to each held-out prompt. Each process takes a share of the prompts.

    The random numbers are the same every time.
    """
    failpoint("step.evaluate")
    setup = trainer.setup
    config = setup.config
    policy = EvaluatedPolicy(
        "policy", setup.actor_critic, setup.tokenizer, setup.end_ids, setup.held_out, setup.stop_texts
    )
    decoding = DecodingSettings(
        num_responses=config.evaluate.num_responses,
        batch_size=config.rollout.batch_size,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        stop_in_text=config.rollout.stop_in_text,
    )
    scoring = partial(setup.score, together=False)  # the processes score different numbers of batches
    models = [setup.actor_critic.policy, setup.reference and setup.reference.policy, *setup.reward_models]
    with gathered_weights(*models):
        responses = sample_and_score(policy, setup.reference, scoring, decoding, config.seed, "policy", setup.world)
    verified = "score", config.evaluate.pass_at, config.evaluate.pass_score
    measured = responses.summary() | pass_rates(responses, *verified) | judge_metrics(setup.scorers, setup.world)
    return {f"evaluate/{name}": value for name, value in measured.items()}


def _tell(world: World, line: str) -> None:
    if world.is_main:
        print_line(line)
