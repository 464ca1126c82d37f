"""A supervised task, and the state of its training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel.config import OptimSettings
from keel.errors import Diverged
from keel.failpoints import failpoint, inject_nan
from keel.learn.guard import Guard, find_fault
from keel.learn.optim import build_optimizer, clip_gradients, gradient_norm
from keel.loop.checkpoints import TrainedState
from keel.models.prompt_reading import print_remarks
from keel.run.checkpoint import checkpoint_to_resume
from keel.run.folder import RunFolder
from keel.world import World


@dataclass(frozen=True)
class SupervisedTask:
    """A supervised task: the model, its rows by index, its loss and its evaluation."""

    name: str  # prefix of the metrics
    model: nn.Module
    lengths: Sequence[int]  # tokens of each row, all its texts together
    weights: Sequence[int]  # weight of each row in the mean loss: its number of learned tokens, or 1
    row: Callable[[int], Mapping[str, Any]]  # a row in readable form
    loss: Callable[[Sequence[int]], Tensor]  # sum over these rows; the caller divides it by the weights of all rows
    evaluate: Callable[[], dict[str, float]]  # metrics on the held-out rows
    facts: Mapping[str, float]  # metrics of the data, which training does not change
    save: Callable[[Any, Path, Mapping[str, float]], None]  # write a model and its metrics as a model folder
    result: str = "model"  # name of that folder in the run folder
    watch: Callable[[], float] | None = None  # loss on the watched rows; if set, the best weights are kept
    conclude: Callable[[RunFolder], Mapping[str, float]] = lambda folder: {}  # more metrics of the final weights
    prepare: Callable[[RunFolder], None] = lambda folder: None  # called before the first step, with the initial weights
    start_step: Callable[[Sequence[int]], Mapping[str, float]] = (
        lambda rows: {}
    )  # called on every process with all rows
    # of a step, before its losses; the metrics are logged


@dataclass
class Best:
    """The weights with the lowest loss on the watched rows."""

    loss: float = math.inf
    step: int = 0
    misses: int = 0  # evaluations since then, all with a higher loss
    weights: dict[str, Tensor] = field(default_factory=dict)

    def compare(self, loss: float, step: int, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights if their loss is the lowest so far. Raises Diverged for a loss that is not finite."""
        if not math.isfinite(loss):
            raise Diverged("the loss on the watched rows is not finite", f"step {step}", "lower optim.learning_rate")
        if loss < self.loss:
            self.loss, self.step, self.misses = loss, step, 0
            self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        else:
            self.misses += 1


@dataclass
class Learner:
    """A task with the state of its training."""

    task: SupervisedTask
    trained: TrainedState
    step: int = 0
    unlogged: dict[str, float] | None = None  # metrics of the last step, until it has been evaluated and logged
    best: Best = field(default_factory=Best)

    @classmethod
    def start(cls, task: SupervisedTask, optim: OptimSettings) -> "Learner":
        """Return a learner at step 0, with a new optimizer."""
        optimizer = build_optimizer([(task.model.parameters(), optim.learning_rate)], optim.weight_decay, optim.eps)
        return cls(task, TrainedState(task.model, optimizer, Guard(optim.on_fault, optim.max_skips, optim.spike)))

    @property
    def num_logged(self) -> int:
        """Number of steps in the log."""
        return self.step - (self.unlogged is not None)

    def compare_with_best(self, metrics: Mapping[str, float]) -> None:
        """Copy the weights if they are the best so far. Raises Diverged for a watched loss that is not finite."""
        if self.task.watch is not None:
            self.best.compare(metrics["watched_loss"], self.step, self.trained.weights)

    def optimizer_step(self, loss_finite: bool, max_grad_norm: float) -> tuple[float, bool]:
        """Clip the gradient and update the weights, unless the guard skips the step.

        Returns the norm of the gradient before clipping, and whether the step was taken. Raises Diverged.
        """
        parameters = [parameter for parameter in self.task.model.parameters() if parameter.requires_grad]
        norm = inject_nan("update.gradient", gradient_norm(parameters))
        norms = {self.task.name: float(norm)}
        guard, optimizer = self.trained.guard, self.trained.optimizer
        taken = guard.admits(norms, find_fault(loss_finite, norms, self.task.model.named_parameters()))
        if taken:
            clip_gradients(parameters, max_grad_norm, norm)
            failpoint("update.optimizer")
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm), taken

    def save(self, folder: RunFolder, keep: int, world: World) -> None:
        """Save a checkpoint. Random numbers are no part of it: each stream depends on the step alone."""
        best = self.best
        state = {"unlogged": self.unlogged, "best": {"loss": best.loss, "step": best.step, "misses": best.misses}}
        watched = {"best": best.weights} if self.task.watch is not None else {}
        self.trained.save(folder, self.step, state, keep, world, tensors=watched)

    def restore(self, folder: RunFolder) -> None:
        """Load the newest checkpoint, if there is one."""
        checkpoint = checkpoint_to_resume(folder, lambda line: print_remarks([line]))
        if checkpoint is None:
            return
        self.trained.restore(checkpoint)
        if self.task.watch is not None:
            weights = {name: torch.empty_like(weight) for name, weight in self.trained.weights.items()}
            saved = checkpoint.tensors("best")
            for name, weight in weights.items():
                saved.fill(name, weight)
            self.best = Best(**checkpoint.state["best"], weights=weights)
        self.step, self.unlogged = checkpoint.step, checkpoint.state["unlogged"]
        failpoint("start.resumed")
