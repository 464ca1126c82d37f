"""What `keel sft` and `keel reward` share: the loop over rows whose right answer is known."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from keel.config import SupervisedSettings
from keel.errors import Interrupted
from keel.failpoints import failpoint, poisoned
from keel.interrupts import held, interruptible, sealed, watched
from keel.learn.guard import Guard, fault_of
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
from keel.train.progress import ProgressDisplay
from keel.world import World, generator


@dataclass(frozen=True)
class Task:
    """What is learned: rows are known by their index."""

    name: str  # of the metric keys and the progress display
    model: nn.Module
    lengths: Sequence[int]  # tokens of each row, all its texts together
    weights: Sequence[int]  # of each row in the mean: its counted tokens, or 1
    loss: Callable[[Sequence[int]], Tensor]  # summed over the given rows; their weights divide it
    evaluate: Callable[[], dict[str, float]]  # figures on the held-out rows
    facts: Mapping[str, float]  # figures that no training changes
    save: Callable[[Path], None]  # the result as a plain model folder


@dataclass(frozen=True)
class Learner:
    """A task, and what changes besides its weights."""

    task: Task
    optimizer: AdamW
    guard: Guard

    def step(self, loss_finite: bool, max_grad_norm: float) -> tuple[float, bool]:
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
    done = restore(folder, learner) if resume else 0
    total = num_steps(config, len(task.lengths))
    figures: dict[str, float] = {}
    with open_sinks(folder, config, done) as sinks, ProgressDisplay(task.name, total, done) as display:
        if done in (0, total):
            figures = task.evaluate()
        if done == 0:
            log(sinks, task, 0, evaluation(figures) | dict(task.facts))
        for step in range(done, total):
            stop_if_asked(folder, learner, step, config.checkpoint.keep)
            with held():
                metrics = update(config, learner, step, total)
                if epoch_ends(config, len(task.lengths), step) or step + 1 == total:
                    figures = task.evaluate()
                    metrics |= evaluation(figures)
                failpoint("step.log")
                log(sinks, task, step + 1, metrics)
                display.show(step + 1, {"loss": metrics["loss"], **evaluation(figures)})
                if step + 1 == total or (config.checkpoint.every and (step + 1) % config.checkpoint.every == 0):
                    save(folder, learner, step + 1, config.checkpoint.keep)
    return figures | dict(task.facts)


def stop_if_asked(folder: RunFolder, learner: Learner, step: int, keep: int) -> None:
    """Between two steps a signal ends the run, with the finished ones in a checkpoint."""
    try:
        with interruptible():
            return
    except Interrupted:
        if step > 0:
            save(folder, learner, step, keep)
        raise


def evaluation(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in figures.items()}


def update(config: SupervisedSettings, learner: Learner, step: int, total: int) -> dict[str, float]:
    """One optimizer step: the weighted mean of the loss over the step's rows, whatever the micro-batches."""
    failpoint("step.update")
    start, task, optimizer = time.perf_counter(), learner.task, learner.optimizer
    rows = rows_of_step(config, len(task.lengths), step)
    loss = accumulate(task, rows, config.microbatch_tokens)
    factor = learning_rate_factor(config.optim.schedule, step, total, config.optim.warmup_steps)
    set_learning_rate(optimizer, factor)
    norm, taken = learner.step(math.isfinite(loss), config.optim.max_grad_norm)
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


def save(folder: RunFolder, learner: Learner, step: int, keep: int) -> None:
    """A checkpoint of all that the next step depends on; random streams depend on the step alone."""
    tensors = {"weights": trained_weights(learner.task), "optimizer": optimizer_tensors(learner.optimizer)}
    with sealed():
        save_checkpoint(folder, step, {"guard": learner.guard.counters()}, tensors, {}, keep)


def restore(folder: RunFolder, learner: Learner) -> int:
    """Put back the newest checkpoint; the number of steps it had done."""
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return 0
    saved = checkpoint.tensors("weights")
    with torch.no_grad():
        for name, weight in trained_weights(learner.task).items():
            weight.copy_(saved[name])
    load_optimizer_tensors(learner.optimizer, checkpoint.tensors("optimizer"))
    learner.guard.restore(checkpoint.state["guard"])
    failpoint("start.resumed")
    return checkpoint.step


def trained_weights(task: Task) -> dict[str, Tensor]:
    return {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}


def publish(folder: RunFolder, task: Task, figures: Mapping[str, Any]) -> None:
    """The model in `output/model`, and the figures beside it."""
    replace_folder(folder.model, task.save)
    write_atomic(folder.path / "figures.json", json.dumps(figures, indent=1) + "\n")
