"""What `keel sft` and `keel reward` share: the loop over rows whose right answer is known."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TypeVar

import torch

from keel.config import SupervisedSettings
from keel.errors import Diverged, Interrupted
from keel.failpoints import failpoint, poisoned
from keel.interrupts import held, interruptible, sealed, watched
from keel.learn.guard import Guard
from keel.learn.optim import (
    build_optimizer,
    learning_rate_factor,
    microbatches,
    set_learning_rate,
    warmup_warning,
)
from keel.run.folder import RunFolder, remove, replace_folder, write_figures
from keel.run.metrics import JsonlMetrics, MetricSink, TensorBoardMetrics, truncate_after
from keel.run.origin import check_origin
from keel.terminal import tell
from keel.training.faulty_batch import keep_rows
from keel.supervised.learner import Learner, Task, put_weights, restore, save
from keel.progress import ProgressDisplay
from keel.world import World, generator

ResultT = TypeVar("ResultT")


def fit(config: SupervisedSettings, task: Task, resume: bool = False) -> dict[str, float]:
    """Train, evaluate before and after every pass over the data, save the model. Returns the last figures."""
    World.single()
    opened = RunFolder.open(config.output, config.model_dump(mode="json"), resume)
    with watched(), closing(opened), opened.told() as folder:
        check_origin(
            folder, [config.model, config.data.path, config.data.eval_path, config.data.chat_template], 1, resume
        )
        failpoint("start.loaded")
        task.prepare(folder)
        figures = train(config, task, folder, resume)
        with sealed():
            publish(folder, task, figures)
            if not config.checkpoint.keep_final:
                remove(folder.checkpoints)
    return figures


def train(config: SupervisedSettings, task: Task, folder: RunFolder, resume: bool) -> dict[str, float]:
    """All steps that are still to do. Returns the last figures."""
    optim = config.optim
    optimizer = build_optimizer([(task.model.parameters(), optim.learning_rate)], optim.weight_decay, optim.eps)
    learner = Learner(task, optimizer, Guard(optim.on_fault, optim.max_skips, optim.spike))
    if resume:
        restore(folder, learner)
    total = num_steps(config, len(task.lengths))
    if warning := warmup_warning(optim.warmup_steps, total):
        tell(warning)
    figures: dict[str, float] = {}
    with (
        open_sinks(folder, config, learner.logged if learner.step else -1) as sinks,
        ProgressDisplay(task.name, total, learner.logged) as display,
    ):
        if learner.step == 0:
            figures = evaluate(task)
            learner.note(figures)
            log(sinks, task, 0, evaluation(figures) | dict(task.facts))
        with held():
            while not finished(config, learner, total):
                if learner.unlogged is None:
                    or_save(lambda: None, folder, config, learner)
                    learner.unlogged = update_or_tell(config, learner, learner.step, total, folder)
                    learner.step += 1
                step, metrics = learner.step, learner.unlogged
                if evaluates(config, len(task.lengths), step) or step == total:
                    figures = or_save(partial(evaluate, task), folder, config, learner)
                    learner.note(figures)
                    metrics = metrics | evaluation(figures)
                failpoint("step.log")
                log(sinks, task, step, metrics)
                display.show(step, {"loss": metrics["loss"], **evaluation(figures)})
                learner.unlogged = None
                if finished(config, learner, total) or checkpoint_due(config, step):
                    save(folder, learner, config.checkpoint.keep)
    return conclusion(learner, figures, folder)


def evaluate(task: Task) -> dict[str, float]:
    """Figures on the held-out rows and, with patience, the loss on the watched ones."""
    return task.evaluate() | ({} if task.watch is None else {"watched_loss": task.watch()})


def finished(config: SupervisedSettings, learner: Learner, total: int) -> bool:
    if learner.unlogged is not None:
        return False
    return learner.step >= total or bool(config.patience and learner.best.misses >= config.patience)


def conclusion(learner: Learner, figures: dict[str, float], folder: RunFolder) -> dict[str, float]:
    """Figures of the result: the last weights, of which these are the figures if any, or with patience the best."""
    task, best = learner.task, learner.best
    if task.watch is not None:
        put_weights(task, best.weights)
        figures = evaluate(task) | {"best_step": best.step}
        tell(f"{task.name}: ended at step {learner.step}; the weights of step {best.step} are kept")
    return (figures or task.evaluate()) | dict(task.facts) | dict(task.conclude(folder))


def or_save(job: Callable[[], ResultT], folder: RunFolder, config: SupervisedSettings, learner: Learner) -> ResultT:
    """The result of a job that changes nothing; a signal ends the run here, with what was done in a checkpoint."""
    try:
        with interruptible():
            return job()
    except Interrupted:
        if learner.step > 0:
            save(folder, learner, config.checkpoint.keep)
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
    return math.ceil(num_rows_taken(config, num_rows) / config.batch_size)


def num_rows_taken(config: SupervisedSettings, num_rows: int) -> int:
    """Rows of all passes together; of a pass that is not whole the nearest number, and one at least."""
    return max(1, round(config.epochs * num_rows))


def rows_of_step(config: SupervisedSettings, num_rows: int, step: int) -> list[int]:
    """Each pass is a fresh shuffle that depends on seed and pass alone; a batch may reach into the next pass."""
    end = min((step + 1) * config.batch_size, num_rows_taken(config, num_rows))
    rows: list[int] = []
    for position in range(step * config.batch_size, end):
        epoch, place = divmod(position, num_rows)
        if place == 0 or not rows:
            order = torch.randperm(num_rows, generator=generator(config.seed, "order", epoch)).tolist()
        rows.append(order[place])
    return rows


def evaluates(config: SupervisedSettings, num_rows: int, step: int) -> bool:
    """After this step: every `eval_every` steps, or where a pass over the data ends."""
    if config.eval_every:
        return step % config.eval_every == 0
    return step * config.batch_size // num_rows > (step - 1) * config.batch_size // num_rows


def checkpoint_due(config: SupervisedSettings, step: int) -> bool:
    return bool(config.checkpoint.every and step % config.checkpoint.every == 0)


@contextmanager
def open_sinks(folder: RunFolder, config: SupervisedSettings, done: int) -> Iterator[list[MetricSink]]:
    """Where metrics go, cut back to the step that the run goes on from."""
    truncate_after(folder.metrics, done, first=0)
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


def publish(folder: RunFolder, task: Task, figures: Mapping[str, float]) -> None:
    """The result as a model folder, and the figures beside it."""
    replace_folder(folder.path / task.result, lambda target: task.save(target, figures))
    write_figures(folder, figures)
