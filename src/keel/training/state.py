"""What a run of policy learning carries from step to step, and how it is kept on disk."""

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
from keel.models.heads import plain
from keel.models.loading import as_classifier, dtype_name, load_classifier, save_model, save_policy
from keel.models.sameness import probe_tokens, require_same, values
from keel.run.checkpoint import Checkpoint
from keel.run.folder import RunFolder, replace_folder
from keel.training.setup import TrainingSetup

StepRecord = tuple[dict[str, float], list[dict[str, Any]]]
"""A step's metrics, and some of its answers."""


@dataclass
class RunState:
    """What changes from step to step besides weights and moments; random streams depend on the step alone."""

    step: int
    kl_coef: float
    trust_sampler: bool = False  # the self-check found its log-probs to be the trainer's
    statistics: ScoreStatistics = field(default_factory=ScoreStatistics)
    unlogged: StepRecord | None = None  # of the last step, until it has been evaluated and written down
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def num_logged(self) -> int:
        """Number of steps in the logs."""
        return self.step - (self.unlogged is not None)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def trained_state(parts: TrainingSetup) -> TrainedState:
    """What a checkpoint holds of the models: the trained weights, the optimizer and the guard."""
    return TrainedState(parts.actor_critic, parts.updater.optimizer, parts.updater.guard)


def save(parts: TrainingSetup, state: RunState, folder: RunFolder) -> None:
    """Save a checkpoint of everything the next step depends on, and the policy as a plain model folder."""
    if not parts.world.is_main:
        return
    trained_state(parts).save(
        folder,
        state.step,
        {
            "kl_coef": state.kl_coef,
            "statistics": asdict(state.statistics),
            "value_units": asdict(parts.actor_critic.value_units),
            "unlogged": state.unlogged,
        },
        parts.config.checkpoint.keep,
        models={"policy": lambda path: save_model(parts.actor_critic.policy, parts.tokenizer, path)},
    )


def restore(parts: TrainingSetup, state: RunState, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights, moments and counters. Raises ConfigError for one of another model or keel."""
    if "value_units" not in checkpoint.state:
        raise ConfigError("the checkpoint was written by an older keel", str(checkpoint.path), "start a new run")
    trained_state(parts).restore(checkpoint)
    state.step, state.kl_coef = checkpoint.step, checkpoint.state["kl_coef"]
    state.statistics = ScoreStatistics(**checkpoint.state["statistics"])
    parts.actor_critic.value_units = ValueUnits(**checkpoint.state["value_units"])
    state.unlogged = checkpoint.state["unlogged"]


def save_result(parts: TrainingSetup, folder: RunFolder) -> None:
    """The trained policy, and the critic as a sequence classifier, in plain transformers folders."""
    if not parts.world.is_main:
        return
    models = parts.actor_critic
    if parts.config.rollout.stop:  # whoever loads the policy stops where it learned to
        plain(models.policy).generation_config.eos_token_id = parts.end_ids
    with interrupts_blocked():
        replace_folder(folder.policy, lambda path: save_policy(models.policy, parts.tokenizer, path))
        if models.has_critic:
            replace_folder(folder.critic, lambda path: _save_critic(parts, path))


def _save_critic(parts: TrainingSetup, path: Path) -> None:
    """A sequence classifier whose score, plus `keel_value_offset` of its config.json, is the value of a state.

    The heads of transformers' classifiers have no bias that the offset could become. Raises CheckpointError if what
    was saved has other values.
    """
    models, units = parts.actor_critic, parts.actor_critic.value_units
    critic, model, head = models.critic, models.policy, models.value_head
    if critic is None:
        critic = as_classifier(model, head, parts.tokenizer.pad_token_id)
    else:
        model, head = critic, plain(critic).score
    classifier: Any = plain(critic)
    classifier.config.keel_value_offset = units.offset
    with scaled(classifier.score, units.gain):
        save_model(critic, parts.tokenizer, path)
    saved, tokens = load_classifier(str(path), dtype_name(critic)).to(parts.world.device), probe_tokens(model)
    require_same(units.gain * values(model, head, tokens), values(saved, saved.score, tokens), critic, path)


@contextmanager
def scaled(head: nn.Module, factor: float) -> Iterator[None]:
    """Inside, the weights of a head are multiplied by `factor`; afterwards they are, bit for bit, what they were."""
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
