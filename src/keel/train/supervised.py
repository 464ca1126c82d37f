"""What `keel sft` and `keel reward` share: the loop over rows whose right answer is known."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from keel.config import SupervisedSettings
from keel.errors import ConfigError, Diverged, Interrupted
from keel.failpoints import failpoint, poisoned
from keel.interrupts import held, interruptible, sealed, watched
from keel.learn.guard import Guard, fault_of, require_finite
from keel.learn.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate_factor,
    microbatches,
    set_learning_rate,
)
from keel.run.checkpoint import latest_checkpoint, load_optimizer_tensors, optimizer_tensors, save_checkpoint
from keel.run.folder import RunFolder, replace_folder, write_atomic
from keel.run.metrics import JsonlMetrics, MetricSink, TensorBoardMetrics, truncate_after
from keel.run.origin import check_origin
from keel.train.evidence import keep_rows
from keel.train.progress import ProgressDisplay
from keel.world import World, generator

ResultT = TypeVar("ResultT")


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
    save: Callable[[Path], None]  # the result as a plain model folder


@dataclass
class Learner:
    """A task, and what changes besides its weights."""

    task: Task
    optimizer: AdamW
    guard: Guard
    step: int = 0
    unlogged: dict[str, float] | None = None  # figures of the last step, until it has been evaluated and written down

    @property
    def logged(self) -> int:
        """The last step that stands in the log."""
        return self.step - (self.unlogged is not None)

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


def fit(config: SupervisedSettings, task: Task, resume: bool = False) -> dict[str, float]:
    """Train, evaluate before and after every pass over the data, save the model. Returns the last figures."""
    World.single()
    with watched(), closing(RunFolder.open(config.output, config.model_dump(mode="json"), resume)) as folder:
        check_origin(folder, [config.model, config.data.path, config.data.eval_path], 1, resume)
        failpoint("start.loaded")
        figures = train(config, task, folder, resume)
        with sealed():
            publish(folder, task, figures)
    return figures


def train(config: SupervisedSettings, task: Task, folder: RunFolder, resume: bool) -> dict[str, float]:
    """All steps that are still to do. Returns the last figures."""
    optim = config.optim
    optimizer = build_optimizer([(task.model.parameters(), optim.learning_rate)], optim.weight_decay, optim.eps)
    learner = Learner(task, optimizer, Guard(optim.on_fault, optim.max_skips, optim.spike))
    if resume:
        restore(folder, learner)
    total = num_steps(config, len(task.lengths))
    figures: dict[str, float] = task.evaluate() if learner.logged in (0, total) else {}
    with (
        open_sinks(folder, config, learner.logged) as sinks,
        ProgressDisplay(task.name, total, learner.logged) as display,
    ):
        if learner.logged == 0:
            log(sinks, task, 0, evaluation(figures) | dict(task.facts))
        with held():
            while learner.step < total or learner.unlogged:
                if learner.unlogged is None:
                    or_save(lambda: None, folder, config, learner)
                    learner.unlogged = update_or_tell(config, learner, learner.step, total, folder)
                    learner.step += 1
                step, metrics = learner.step, learner.unlogged
                if epoch_ends(config, len(task.lengths), step - 1) or step == total:
                    figures = or_save(task.evaluate, folder, config, learner)
                    metrics = metrics | evaluation(figures)
                failpoint("step.log")
                log(sinks, task, step, metrics)
                display.show(step, {"loss": metrics["loss"], **evaluation(figures)})
                learner.unlogged = None
                if step == total or (config.checkpoint.every and step % config.checkpoint.every == 0):
                    save(folder, config, learner)
    return figures | dict(task.facts)


def or_save(job: Callable[[], ResultT], folder: RunFolder, config: SupervisedSettings, learner: Learner) -> ResultT:
    """The result of a job that changes nothing; a signal ends the run here, with what was done in a checkpoint."""
    try:
        with interruptible():
            return job()
    except Interrupted:
        if learner.step > 0:
            save(folder, config, learner)
        raise


def evaluation(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in figures.items()}


def update_or_tell(
    config: SupervisedSettings, learner: Learner, step: int, total: int, folder: RunFolder
) -> dict[str, float]:
    """The update; the rows of one that went wrong are kept to be looked at."""
    task = learner.task

    def tell(what: str) -> str:
        return keep_rows(folder, step + 1, what, map(task.row, rows_of_step(config, len(task.lengths), step)))

    try:
        metrics = update(config, learner, step, total)
    except Diverged as error:
        raise Diverged(error.what, f"step {step + 1}{tell(error.what)}", error.fix) from error
    if metrics["skipped"]:
        tell("the update was skipped")
    return metrics


def update(config: SupervisedSettings, learner: Learner, step: int, total: int) -> dict[str, float]:
    """One optimizer step: the weighted mean of the loss over the step's rows, whatever the micro-batches."""
    failpoint("step.update")
    start, task, optimizer = time.perf_counter(), learner.task, learner.optimizer
    rows = rows_of_step(config, len(task.lengths), step)
    loss = accumulate(task, rows, config.microbatch_tokens)
    factor = learning_rate_factor(config.optim.schedule, step, total, config.optim.warmup_steps)
    set_learning_rate(optimizer, factor)
    norm, taken = learner.move(math.isfinite(loss), config.optim.max_grad_norm)
    num_tokens = sum(task.lengths[i] for i in rows)
    return {
        "loss": loss,
        "learning_rate": config.optim.learning_rate * factor,
        "grad_norm": norm,
        "skipped": float(not taken),
        "epoch": (step * config.batch_size + len(rows)) / len(task.lengths),
        "tokens_per_second": num_tokens / (time.perf_counter() - start),
    }


def accumulate(task: Task, rows: Sequence[int], microbatch_tokens: int) -> float:
    """Add the gradient of the rows' weighted mean loss, one micro-batch after the other; the loss."""
    weight = sum(task.weights[i] for i in rows)
    total = 0.0
    for part in microbatches([task.lengths[i] for i in rows], microbatch_tokens):
        loss = poisoned("update.loss", task.loss([rows[i] for i in part]) / weight)
        loss.backward()
        total += float(loss.detach())
    return total


def num_steps(config: SupervisedSettings, num_rows: int) -> int:
    return max(1, math.ceil(config.epochs * num_rows / config.batch_size))


def rows_of_step(config: SupervisedSettings, num_rows: int, step: int) -> list[int]:
    """Each pass is a fresh shuffle that depends on seed and pass alone; a batch may reach into the next pass."""
    end = min((step + 1) * config.batch_size, max(1, round(config.epochs * num_rows)))
    rows: list[int] = []
    for position in range(step * config.batch_size, end):
        epoch, place = divmod(position, num_rows)
        if place == 0 or not rows:
            order = torch.randperm(num_rows, generator=generator(config.seed, "order", epoch)).tolist()
        rows.append(order[place])
    return rows


def epoch_ends(config: SupervisedSettings, num_rows: int, step: int) -> bool:
    return (step + 1) * config.batch_size // num_rows > step * config.batch_size // num_rows


@contextmanager
def open_sinks(folder: RunFolder, config: SupervisedSettings, done: int) -> Iterator[list[MetricSink]]:
    """Where metrics go, cut back to the step that the run goes on from."""
    truncate_after(folder.metrics, done or -1)  # the figures before the first step are written anew with it
    sinks: list[MetricSink] = [JsonlMetrics(folder.metrics)]
    if "tensorboard" in config.log.trackers:
        sinks.append(TensorBoardMetrics(folder.tensorboard, done + 1))
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()


def log(sinks: Sequence[MetricSink], task: Task, step: int, metrics: Mapping[str, float]) -> None:
    for sink in sinks:
        sink.log(step, {f"{task.name}/{name}": value for name, value in metrics.items()})


def save(folder: RunFolder, config: SupervisedSettings, learner: Learner) -> None:
    """A checkpoint of all that the next step depends on; random streams depend on the step alone."""
    require_finite(learner.task.model.named_parameters(), learner.step)
    tensors = {"weights": trained_weights(learner.task), "optimizer": optimizer_tensors(learner.optimizer)}
    state = {"guard": learner.guard.counters(), "unlogged": learner.unlogged}
    with sealed():
        save_checkpoint(folder, learner.step, state, tensors, {}, config.checkpoint.keep)


def restore(folder: RunFolder, learner: Learner) -> None:
    """Put back the newest checkpoint, if there is one."""
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return
    saved, own = checkpoint.tensors("weights"), trained_weights(learner.task)
    if saved.keys() != own.keys():
        raise ConfigError("the checkpoint holds other weights than this model", where=str(checkpoint.path))
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(saved[name])
    load_optimizer_tensors(learner.optimizer, checkpoint.tensors("optimizer"))
    learner.guard.restore(checkpoint.state["guard"])
    learner.step, learner.unlogged = checkpoint.step, checkpoint.state["unlogged"]
    print(f"keel: {checkpoint}", file=sys.stderr, flush=True)
    failpoint("start.resumed")


def trained_weights(task: Task) -> dict[str, Tensor]:
    return {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}


def publish(folder: RunFolder, task: Task, figures: Mapping[str, Any]) -> None:
    """The model in `output/model`, and the figures beside it."""
    replace_folder(folder.model, task.save)
    write_atomic(folder.path / "figures.json", json.dumps(figures, indent=1) + "\n")
