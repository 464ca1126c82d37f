"""What learns from rows whose right answer is known, and what of it a checkpoint holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from keel.errors import ConfigError, Diverged
from keel.failpoints import failpoint, poisoned
from keel.interrupts import sealed
from keel.learn.guard import Guard, fault_of, require_finite
from keel.learn.optim import clip_gradients, gradient_norm
from keel.run.checkpoint import checkpoint_to_resume, load_optimizer_tensors, optimizer_tensors, save_checkpoint
from keel.run.folder import RunFolder
from keel.terminal import tell


@dataclass(frozen=True)
class Task:
    """What is learned: rows are known by their index."""

    name: str  # of the metric keys and the progress display
    model: nn.Module
    lengths: Sequence[int]  # tokens of each row, all its texts together
    weights: Sequence[int]  # of each row in the mean: its counted tokens, or 1
    row: Callable[[int], Mapping[str, Any]]  # a row as a person reads it
    loss: Callable[[Sequence[int]], Tensor]  # summed over the given rows; their weights divide it
    evaluate: Callable[[], dict[str, float]]  # figures on the held-out rows
    facts: Mapping[str, float]  # figures that no training changes
    save: Callable[[Path, Mapping[str, float]], None]  # the result with these figures as a plain model folder
    result: str = "model"  # its name in the run folder
    watch: Callable[[], float] | None = None  # loss on the watched rows; with it the best weights are kept
    conclude: Callable[[RunFolder], Mapping[str, float]] = lambda folder: {}  # further figures of the final weights
    prepare: Callable[[RunFolder], None] = lambda folder: None  # what needs the weights of the start


@dataclass
class Best:
    """The weights with the lowest loss on the watched rows, and how long ago that was."""

    loss: float = math.inf
    step: int = 0
    misses: int = 0  # evaluations since
    weights: dict[str, Tensor] = field(default_factory=dict)

    def see(self, loss: float, step: int, weights: Mapping[str, Tensor]) -> None:
        """Raises Diverged for a loss that is no number."""
        if not math.isfinite(loss):
            raise Diverged("the loss on the watched rows is not finite", f"step {step}", "lower optim.learning_rate")
        if loss < self.loss:
            self.loss, self.step, self.misses = loss, step, 0
            self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        else:
            self.misses += 1


@dataclass
class Learner:
    """A task, and what changes besides its weights."""

    task: Task
    optimizer: AdamW
    guard: Guard
    step: int = 0
    unlogged: dict[str, float] | None = None  # figures of the last step, until it has been evaluated and written down
    best: Best = field(default_factory=Best)

    @property
    def logged(self) -> int:
        """The last step that stands in the log."""
        return self.step - (self.unlogged is not None)

    def note(self, figures: Mapping[str, float]) -> None:
        """Keep the weights if they are the best so far. Raises Diverged for a watched loss that is no number."""
        if self.task.watch is not None:
            self.best.see(figures["watched_loss"], self.step, trained_weights(self.task))

    def move(self, loss_finite: bool, max_grad_norm: float) -> tuple[float, bool]:
        """Clip and move, if that does no harm; the gradient's norm before, and whether it moved. Raises Diverged."""
        parameters = [parameter for parameter in self.task.model.parameters() if parameter.requires_grad]
        norm = poisoned("update.gradient", gradient_norm(parameters))
        norms = {self.task.name: float(norm)}
        taken = self.guard.admits(norms, fault_of(loss_finite, norms, self.task.model.named_parameters()))
        if taken:
            clip_gradients(parameters, max_grad_norm, norm)
            failpoint("update.optimizer")
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm), taken


def save(folder: RunFolder, learner: Learner, keep: int) -> None:
    """A checkpoint of all that the next step depends on; random streams depend on the step alone."""
    require_finite(learner.task.model.named_parameters(), learner.step)
    tensors = {"weights": trained_weights(learner.task), "optimizer": optimizer_tensors(learner.optimizer)}
    best = learner.best
    if learner.task.watch is not None:
        tensors["best"] = best.weights
    state = {
        "guard": learner.guard.counters(),
        "unlogged": learner.unlogged,
        "best": {"loss": best.loss, "step": best.step, "misses": best.misses},
    }
    with sealed():
        save_checkpoint(folder, learner.step, state, tensors, {}, keep)


def restore(folder: RunFolder, learner: Learner) -> None:
    """Put back the newest checkpoint, if there is one."""
    checkpoint = checkpoint_to_resume(folder, tell)
    if checkpoint is None:
        return
    saved = checkpoint.tensors("weights")
    if saved.keys() != trained_weights(learner.task).keys():
        raise ConfigError("the checkpoint holds other weights than this model", where=str(checkpoint.path))
    put_weights(learner.task, saved)
    if learner.task.watch is not None:
        learner.best = Best(**checkpoint.state["best"], weights=checkpoint.tensors("best"))
    load_optimizer_tensors(learner.optimizer, checkpoint.tensors("optimizer"))
    learner.guard.restore(checkpoint.state["guard"])
    learner.step, learner.unlogged = checkpoint.step, checkpoint.state["unlogged"]
    failpoint("start.resumed")


def trained_weights(task: Task) -> dict[str, Tensor]:
    return {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def put_weights(task: Task, weights: Mapping[str, Tensor]) -> None:
    for name, weight in trained_weights(task).items():
        weight.copy_(weights[name])
