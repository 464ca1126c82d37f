"""The state of a training run from step to step, its checkpoints and its result."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keel.errors import ConfigError
from keel.interrupts import interrupts_blocked
from keel.learn.shaping import ScoreStatistics
from keel.loop.checkpoints import TrainedState
from keel.models.actor_critic import ValueUnits
from keel.models.heads import unwrap_model
from keel.models.loading import as_classifier, dtype_name, load_classifier, save_model, save_policy
from keel.models.sameness import probe_tokens, probe_values, require_same
from keel.models.sharding import gather_head, gather_model
from keel.run.checkpoint import Checkpoint
from keel.run.folder import RunFolder, replace_folder
from keel.training.setup import TrainingSetup

StepRecord = tuple[dict[str, float], list[dict[str, Any]]]
"""A step's metrics, and some of its responses as rows of the log."""


@dataclass
class RunState:
    """Everything that changes from step to step besides weights and moments.

    Random numbers are no part of it: each stream depends on the step alone.
    """

    step: int
    kl_coef: float
    extra_prompts: int = 0  # drawn by all steps in addition to those of their batches, to replace groups
    trust_sampler: bool = False  # the self-check found the sampler's log-probs equal to the trainer's
    statistics: ScoreStatistics = field(default_factory=ScoreStatistics)
    unlogged: StepRecord | None = None  # of the last step, until it has been evaluated and logged
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase of the last step

    @property
    def num_logged(self) -> int:
        """Number of steps in the logs."""
        return self.step - (self.unlogged is not None)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measure the seconds of the block as those of `phase`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def trained_state(setup: TrainingSetup) -> TrainedState:
    """Return the trained weights with their optimizer and guard, which every checkpoint holds."""
    return TrainedState(setup.actor_critic, setup.updater.optimizer, setup.updater.guard)


def save_run_state(setup: TrainingSetup, state: RunState, folder: RunFolder) -> None:
    """Save a checkpoint of everything the next step depends on, and the policy as a plain model folder."""
    checkpoint = setup.config.checkpoint
    has_model = checkpoint.models == "every" or state.step == setup.config.steps
    policy = gather_model(setup.actor_critic.policy, setup.world) if has_model else None
    trained_state(setup).save(
        folder,
        state.step,
        {
            "kl_coef": state.kl_coef,
            "statistics": asdict(state.statistics),
            "value_units": asdict(setup.actor_critic.value_units),
            "extra_prompts": state.extra_prompts,
            "unlogged": state.unlogged,
        },
        checkpoint.keep,
        setup.world,
        models={"policy": lambda path: save_model(policy, setup.tokenizer, path)} if has_model else {},
    )


def restore_run_state(setup: TrainingSetup, state: RunState, checkpoint: Checkpoint) -> None:
    """Load the weights, moments and counters of a checkpoint.

    Raises ConfigError for a checkpoint of another model or of an older keel.
    """
    if "value_units" not in checkpoint.state:
        raise ConfigError("the checkpoint was written by an older keel", str(checkpoint.path), "start a new run")
    trained_state(setup).restore(checkpoint)
    state.step, state.kl_coef = checkpoint.step, checkpoint.state["kl_coef"]
    state.extra_prompts = checkpoint.state.get("extra_prompts", 0)  # an older keel did not resample
    state.statistics = ScoreStatistics(**checkpoint.state["statistics"])
    setup.actor_critic.value_units = ValueUnits(**checkpoint.state["value_units"])
    state.unlogged = checkpoint.state["unlogged"]


def save_result(setup: TrainingSetup, folder: RunFolder) -> None:
    """Save the trained policy, and the critic as a sequence classifier, as transformers model folders.

    Every process must call it. The main process gathers one model after the other, and writes it.
    """
    models, world = setup.actor_critic, setup.world
    if setup.config.rollout.stop:  # other tools must end responses at the tokens that the policy learned to end with
        unwrap_model(models.policy).generation_config.eos_token_id = setup.end_ids
    with interrupts_blocked():
        model = gather_model(models.policy, world)
        if world.is_main:
            replace_folder(folder.policy, lambda path: save_policy(model, setup.tokenizer, path))
        head = None if models.value_head is None else gather_head(models.value_head, world)
        if models.critic is not None:
            model = gather_model(models.critic, world)  # the copy of the policy is freed
            head = model and unwrap_model(model).score
        if world.is_main and models.has_critic:
            replace_folder(folder.critic, lambda path: _save_critic(setup, model, head, path))
    world.barrier()


def _save_critic(setup: TrainingSetup, model: Any, head: Any, path: Path) -> None:
    """Save the critic as a sequence classifier. Its score plus `keel_value_offset` of its config.json is the value.

    The offset is stored in the config because the heads of transformers' classifiers have no bias. Raises
    CheckpointError if the saved model has other values.

    Args:
        model: the critic, or with a shared trunk the policy.
        head: the critic's head, or the value head on the policy.
    """
    units, critic = setup.actor_critic.value_units, model
    if setup.actor_critic.critic is None:
        critic = as_classifier(model, head, setup.tokenizer.pad_token_id)
    classifier: Any = unwrap_model(critic)
    classifier.config.keel_value_offset = units.offset
    with scaled(classifier.score, units.gain):
        save_model(critic, setup.tokenizer, path)
    saved, tokens = load_classifier(str(path), dtype_name(critic)).to(classifier.device), probe_tokens(model)
    require_same(units.gain * probe_values(model, head, tokens), probe_values(saved, saved.score, tokens), critic, path)


@contextmanager
def scaled(head: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the weights of a head by `factor` inside the block, and restore the same bits after it."""
    originals = [(weight, weight.detach().clone()) for weight in head.parameters()]
    with torch.no_grad():
        for weight, original in originals:
            weight.copy_(original * factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)
