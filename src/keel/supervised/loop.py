"""The training loop of `keel sft`, `keel reward` and `keel dpo`."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch

from keel.config import SupervisedSettings
from keel.errors import Diverged
from keel.failpoints import failpoint, inject_nan
from keel.interrupts import interrupts_blocked, interrupts_deferred, interrupts_handled
from keel.learn.gather import deal_rows
from keel.learn.optim import learning_rate_factor, microbatches, set_learning_rate, warmup_warning
from keel.loop.checkpoints import checkpoint_due, checkpoint_on_error, interrupt_together
from keel.loop.open_run import open_run
from keel.models.prompt_reading import print_remarks
from keel.models.sharding import gather_model, idle_passes
from keel.progress import ProgressDisplay
from keel.run.faulty_rows import keep_rows
from keel.run.folder import RunFolder, delete_path, replace_folder, write_final_metrics
from keel.run.metrics_log import open_sinks
from keel.supervised.learner import Learner, SupervisedTask
from keel.world import World, generator


def fit(config: SupervisedSettings, task: SupervisedTask, world: World, resume: bool = False) -> dict[str, float]:
    """Train the task's model, evaluate it at the start and after each pass, and save it. Return the final metrics.

    Every process of the world must call it, and all return the same metrics.
    """
    sources = [config.model, config.data.path, config.data.eval_path, config.data.chat_template]
    with interrupts_handled(), open_run(config.output, config, sources, resume, world) as folder:
        failpoint("start.loaded")
        task.prepare(folder)
        # Several processes stop together, at the start of a step.
        with nullcontext() if world.size == 1 else interrupts_blocked():
            metrics = train_task(config, task, folder, world, resume)
            with interrupts_blocked():
                publish(folder, task, metrics, world)
                if world.is_main and not config.checkpoint.keep_final:
                    delete_path(folder.checkpoints)
                world.barrier()
    return metrics


def train_task(
    config: SupervisedSettings, task: SupervisedTask, folder: RunFolder, world: World, resume: bool
) -> dict[str, float]:
    """Run the remaining steps: update, evaluate, log, checkpoint. Return the final metrics."""
    learner = Learner.start(task, config.optim)
    if resume:
        learner.restore(folder)
    total, evaluated = num_steps(config, len(task.lengths)), dict[str, float]()
    if warning := warmup_warning(config.optim.warmup_steps, total):
        print_remarks([warning])

    def save() -> None:
        learner.save(folder, config.checkpoint.keep, world)

    with open_log(config, learner, folder, total, world) as log:
        if learner.step == 0:
            evaluated = evaluate_task(task)
            learner.compare_with_best(evaluated)
            log(0, as_evaluation(evaluated) | dict(task.facts))
        with interrupts_deferred() if world.size == 1 else interrupts_blocked():
            while not is_finished(config, learner, total):
                if learner.unlogged is None:  # otherwise the run was killed between an update and its log line
                    with checkpoint_on_error(save, learner.step, world):
                        pass  # a signal that arrived during the last step takes effect here
                    with rows_kept_on_fault(config, learner, folder, world):
                        learner.unlogged = update(config, learner, total, world)
                        learner.step += 1
                step, metrics = learner.step, learner.unlogged
                if evaluation_due(config, len(task.lengths), step) or step == total:
                    with checkpoint_on_error(save, step, world):
                        evaluated = evaluate_task(task)
                    learner.compare_with_best(evaluated)
                    metrics = metrics | as_evaluation(evaluated)
                failpoint("step.log")
                log(step, metrics, {"loss": metrics["loss"], **as_evaluation(evaluated)})
                learner.unlogged = None
                if is_finished(config, learner, total) or checkpoint_due(step, config.checkpoint.every):
                    save()
    if world.size > 1:
        interrupt_together(world)  # a signal that arrived during the last step
    return result_metrics(learner, evaluated, folder)


def evaluate_task(task: SupervisedTask) -> dict[str, float]:
    """Compute the metrics on the held-out rows and, with `patience`, the loss on the watched rows."""
    return task.evaluate() | ({} if task.watch is None else {"watched_loss": task.watch()})


def is_finished(config: SupervisedSettings, learner: Learner, total: int) -> bool:
    """Whether all steps are done and logged, or `patience` evaluations in a row have brought no better loss."""
    if learner.unlogged is not None:
        return False
    return learner.step >= total or bool(config.patience and learner.best.misses >= config.patience)


def result_metrics(learner: Learner, evaluated: dict[str, float], folder: RunFolder) -> dict[str, float]:
    """Return the metrics of the result.

    The result has the last weights or, with `patience`, the best ones, which are loaded into the model.

    Args:
        evaluated: metrics of the last weights; empty if they were not evaluated.
    """
    task, best = learner.task, learner.best
    if task.watch is not None:
        learner.trained.load_weights(best.weights)
        evaluated = evaluate_task(task) | {"best_step": best.step}
        print_remarks([f"{task.name}: ended at step {learner.step}; the weights of step {best.step} are kept"])
    return (evaluated or task.evaluate()) | dict(task.facts) | dict(task.conclude(folder))


def as_evaluation(metrics: Mapping[str, float]) -> dict[str, float]:
    """Add the prefix that the metrics of an evaluation have in the log."""
    return {f"eval_{name}": value for name, value in metrics.items()}


@contextmanager
def rows_kept_on_fault(config: SupervisedSettings, learner: Learner, folder: RunFolder, world: World) -> Iterator[None]:
    """Keep the rows of the step in the run folder if the update in the block diverges or is skipped."""
    task, step = learner.task, learner.step

    def keep(reason: str) -> str:
        rows = rows_of_step(config, len(task.lengths), step)
        return str(world.from_main(lambda: keep_rows(folder, step + 1, reason, map(task.row, rows))))

    try:
        yield
    except Diverged as error:
        raise Diverged(error.what, f"step {step + 1}{keep(error.what)}", error.fix) from error
    if learner.unlogged and learner.unlogged["skipped"]:
        keep("the update was skipped")


def update(config: SupervisedSettings, learner: Learner, total: int, world: World) -> dict[str, float]:
    """Take one optimizer step on the weighted mean loss of the step's rows. Return the metrics of the step.

    The mean is over all rows of the step, so the micro-batches and the number of processes do not change it.
    """
    failpoint("step.update")
    start, task, step = time.perf_counter(), learner.task, learner.step
    rows = rows_of_step(config, len(task.lengths), step)
    measured = task.start_step(rows)
    loss = accumulate(task, rows, config.microbatch_tokens, world)
    factor = learning_rate_factor(config.optim.schedule, step, total, config.optim.warmup_steps)
    set_learning_rate(learner.trained.optimizer, factor)
    norm, taken = learner.optimizer_step(math.isfinite(loss), config.optim.max_grad_norm)
    num_tokens = sum(task.lengths[i] for i in rows)
    return {
        "loss": loss,
        "learning_rate": config.optim.learning_rate * factor,
        "grad_norm": norm,
        "skipped": float(not taken),
        "epoch": (step * config.batch_size + len(rows)) / len(task.lengths),
        "tokens_per_second": num_tokens / (time.perf_counter() - start),
        **measured,
    }


def accumulate(task: SupervisedTask, rows: Sequence[int], microbatch_tokens: int, world: World) -> float:
    """Accumulate the gradient of the rows' weighted mean loss over micro-batches. Return the loss of all processes.

    The rows are dealt to the processes. A process with fewer micro-batches than another adds passes of the shortest row
    at weight 0: all make equally many, also if a loss is not finite.
    """
    weight = sum(task.weights[i] for i in rows)
    dealt = deal_rows(rows, task.lengths, world.size)[world.rank]
    groups = microbatches([task.lengths[i] for i in dealt], microbatch_tokens)
    idle = idle_passes(task.model, len(groups))
    total = 0.0
    for microbatch in groups:
        loss = inject_nan("update.loss", task.loss([dealt[i] for i in microbatch]) / weight)
        loss.backward()
        total += float(loss.detach())
    for _ in range(idle):
        (0.0 * task.loss([min(rows, key=task.lengths.__getitem__)])).backward()
    return float(world.sum(torch.tensor(total, dtype=torch.float64, device=world.device)))


def num_steps(config: SupervisedSettings, num_rows: int) -> int:
    return math.ceil(num_training_rows(config, num_rows) / config.batch_size)


def num_training_rows(config: SupervisedSettings, num_rows: int) -> int:
    """Return the number of rows in all passes, rounded if `epochs` is no integer, and at least 1."""
    return max(1, round(config.epochs * num_rows))


def rows_of_step(config: SupervisedSettings, num_rows: int, step: int) -> list[int]:
    """Return the rows of a step. Each pass over the data is a new shuffle, and a batch may extend into the next pass.

    The shuffle depends on the seed and the number of the pass alone, so that a resumed run needs no state of it.
    """
    end = min((step + 1) * config.batch_size, num_training_rows(config, num_rows))
    rows: list[int] = []
    for position in range(step * config.batch_size, end):
        epoch, row = divmod(position, num_rows)
        if row == 0 or not rows:
            order = torch.randperm(num_rows, generator=generator(config.seed, "order", epoch)).tolist()
        rows.append(order[row])
    return rows


def evaluation_due(config: SupervisedSettings, num_rows: int, step: int) -> bool:
    """Whether to evaluate after this step: every `eval_every` steps or, if that is 0, at the end of each pass."""
    if config.eval_every:
        return step % config.eval_every == 0
    return step * config.batch_size // num_rows > (step - 1) * config.batch_size // num_rows


class Log(Protocol):
    """Logs the metrics of a step, and shows some of them to the user."""

    def __call__(self, step: int, metrics: Mapping[str, float], shown: Mapping[str, float] | None = None) -> None: ...


@contextmanager
def open_log(
    config: SupervisedSettings, learner: Learner, folder: RunFolder, total: int, world: World
) -> Iterator[Log]:
    """Open the metrics log and the progress display. The log of every process but the main one does nothing."""
    name = learner.task.name
    if not world.is_main:
        yield lambda step, metrics, shown=None: None
        return
    with (
        open_sinks(folder, config.log.trackers, learner.num_logged if learner.step else -1, first=0) as sinks,
        ProgressDisplay(name, total, learner.num_logged) as display,
    ):

        def log(step: int, metrics: Mapping[str, float], shown: Mapping[str, float] | None = None) -> None:
            for sink in sinks:
                sink.log(step, {f"{name}/{metric}": value for metric, value in metrics.items()})
            if shown is not None:
                display.show(step, shown)

        yield log


def publish(folder: RunFolder, task: SupervisedTask, metrics: Mapping[str, float], world: World) -> None:
    """Write the result as a model folder, and its metrics to a file beside it. The main process gathers and writes."""
    model = gather_model(task.model, world)

    def write() -> None:
        replace_folder(folder.path / task.result, lambda target: task.save(model, target, metrics))
        write_final_metrics(folder, metrics)

    world.from_main(write)
