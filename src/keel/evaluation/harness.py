"""Public benchmarks through lm-evaluation-harness, which loads a saved policy by itself."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from keel.config import EvaluateConfig, suggestion
from keel.errors import ConfigError, EngineError
from keel.evaluation.endpoint import is_endpoint
from keel.stats.intervals import Z

Results = dict[str, dict[str, float]]
"""Task -> metric -> value. NAME_low and NAME_high are the ends of the 95% interval over the task's questions."""


def check_tasks(config: EvaluateConfig, sides: Mapping[str, str], num_processes: int) -> None:
    """Check that the harness can evaluate these policies on the tasks. Raises ConfigError."""
    if not config.tasks:
        return
    if num_processes > 1:
        raise ConfigError(f"tasks run in one process, not in {num_processes}", "tasks", "start keel without torchrun")
    for side, folder in sides.items():
        if is_endpoint(folder):
            raise ConfigError("tasks need a model folder, not an address", side, "name a folder, or leave out tasks")
    known = _task_manager(config.harness.folder).all_tasks
    for name in config.tasks:
        if name not in known:
            raise ConfigError(f"no task is called {name!r}", "tasks", suggestion(name, known)[:200])


def evaluate_tasks(config: EvaluateConfig, folder: str) -> Results:
    """Evaluate a saved policy on the tasks of the settings.

    Raises ConfigError without the harness, EngineError if it fails, for example because a data set cannot be loaded.
    """
    lm_eval, manager = _import_harness(), _task_manager(config.harness.folder)
    try:
        result = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "dtype": config.dtype, "trust_remote_code": False},
            tasks=list(config.tasks),
            num_fewshot=config.harness.shots,
            limit=config.harness.limit,
            batch_size=config.harness.batch_size,
            apply_chat_template=config.harness.chat,
            device="cuda" if torch.cuda.is_available() else "cpu",
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        fix = "see the message of lm-evaluation-harness; most tasks download their data"
        raise EngineError(f"{type(error).__name__}: {error}", f"tasks of {folder}", fix) from error
    return read_results(result["results"])


def read_results(results: Mapping[str, Mapping[str, Any]]) -> Results:
    """Read the results of the harness, in which the value of `acc` is at `acc,none` and its error at `acc_stderr,none`.

    A filter other than none is part of the name: `exact_match/strict-match`. The interval is the value +- 1.96 standard
    errors.
    """
    return {task: dict(_metrics(entries)) for task, entries in results.items()}


def _metrics(entries: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in entries.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        name = metric if filtered == "none" else f"{metric}/{filtered}"
        yield name, float(value)
        error = entries.get(f"{metric}_stderr,{filtered}")
        if isinstance(error, int | float):  # the harness writes N/A if it has none
            yield f"{name}_low", float(value) - Z * float(error)
            yield f"{name}_high", float(value) + Z * float(error)


@cache
def _task_manager(folder: str | None) -> Any:
    """Return the index of all tasks, which takes seconds to read."""
    _import_harness()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _import_harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-evaluation-harness ({error})", "tasks", "pip install 'lm_eval[hf]', or leave out tasks"
        ) from error
    return lm_eval
