"""Python functions as scorers, called as TRL calls its reward functions."""

import inspect
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Self

import numpy as np

from keel.data.batches import Rollouts
from keel.data.messages import Content, ends_with_assistant
from keel.endpoints.event_loop import EventLoop
from keel.errors import ConfigError, RewardError
from keel.rollout.reward_file import RewardFolder
from keel.rollout.score_check import Score, check_scores
from keel.rollout.user_code import Deadline, error_line, process_state_restored, reported_when_slow

ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of a reward function for any data."""


@dataclass
class Logged:
    """What a reward function logged about one batch."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)  # name -> a value for each completion


class FunctionScorer:
    """A Python function with the signature of TRL's reward functions, sync or async.

    It gets copies of its arguments, so that it cannot change the run.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, weight: float = 1.0, noisy: bool = False, where: str = ""
    ) -> None:
        self.function, self.name, self.weight, self.noisy = function, name, weight, noisy
        self.place, self.where = f"reward function {name}", where or f"reward function {name}"
        self.takes, self.takes_all, self.required = _parameters(function, self.where)
        self.columns: list[str] | None = None  # columns of the prompts, once they are known
        self.progress = (1, 1)  # steps done and steps in all; outside of training as at its end
        self.logged = Logged()
        self._loop = EventLoop()
        self._folder: RewardFolder | None = None
        self._deadline: Deadline | None = None

    def within(self, folder: RewardFolder, timeout_seconds: float | None) -> Self:
        """Set the folder that the function's code can import from, and a deadline for each batch. Return self."""
        self._folder, self._deadline = folder, Deadline(timeout_seconds) if timeout_seconds else None
        return self

    def check(self, columns: list[str], segments: bool) -> None:
        """Set the columns that every call passes. Raises ConfigError if a required parameter is not among them."""
        self.columns = columns
        ambiguous = [name for name in columns if name in ALWAYS[:3] and (self.takes_all or name in self.takes)]
        if ambiguous:
            raise ConfigError(
                f"`{self.name}` takes `{ambiguous[0]}`, which is a column of the prompts and an argument from keel",
                where=self.where,
                fix="rename the column",
            )
        complaint = self._complaint(columns, segments)
        if complaint:
            raise ConfigError(complaint, self.where, "rename the parameter, give it a default, or add the column")

    def _complaint(self, columns: list[str], segments: bool) -> str:
        """Describe what is wrong with the function's parameters; empty if they match its arguments."""
        arguments = [*ALWAYS, *(["segments"] if segments else []), *columns]
        missing = [name for name in self.required if name not in arguments]
        if not missing and (self.takes_all or self.takes & set(arguments)):
            return ""
        others = f"your columns: {', '.join(columns)}" if columns else "your columns, of which the prompts have none"
        needs = f"takes `{missing[0]}`" if missing else "takes none of its arguments"
        always = ", ".join(f"`{name}`" for name in ALWAYS)
        return f"`{self.name}` {needs}; reward functions are called with {always} and {others}"

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        self.logged = Logged()
        if not rollouts.texts:  # of a process whose share is empty; a function need not expect that
            return []
        values = function_arguments(rollouts, segments, self.columns)
        if self.columns is None and (complaint := self._complaint(list(values), segments is not None)):
            raise RewardError(complaint, self.place)
        values |= self._trainer_arguments(len(rollouts.texts))
        arguments = {name: value for name, value in values.items() if self.takes_all or name in self.takes}

        def call() -> Any:
            scores = self.function(**arguments)
            return self._loop.outcome(scores) if inspect.isawaitable(scores) else scores

        imports: AbstractContextManager[None] = self._folder.importable() if self._folder else nullcontext()
        slow = reported_when_slow(self.place, "timeout_seconds sets a deadline")
        try:
            with process_state_restored(self.place), imports, slow:
                scores = self._deadline.run(call) if self._deadline else call()
                # The scores may be objects of the user's classes, so reading them can run more of the user's code.
                return check_scores(_without_booleans(scores), rollouts, self.place)
        except (KeyboardInterrupt, RewardError):
            raise
        except BaseException as error:  # it may raise anything, including SystemExit and panics of Rust libraries
            file = getattr(getattr(self.function, "__code__", None), "co_filename", None)
            place = f"{self.place}{error_line(error, file)}"
            raise RewardError(f"{type(error).__name__}: {error}", place, "fix the function") from error

    def _trainer_arguments(self, count: int) -> dict[str, Any]:
        """Return the arguments that TRL's trainers pass besides the data."""
        arguments: dict[str, Any] = {}
        if self.takes_all or "trainer_state" in self.takes:
            from transformers import TrainerState

            done, total = self.progress
            arguments["trainer_state"] = TrainerState(global_step=done, max_steps=total, epoch=done / total)
        logged = self.logged

        def log_extra(column: str, values: Iterable[Any]) -> None:
            plain = json.loads(json.dumps(list(values), default=str))
            if len(plain) != count:
                raise RewardError(f"log_extra({column!r}): expected {count} values, got {len(plain)}", self.place)
            logged.columns[str(column)] = plain

        def log_metric(name: str, value: float) -> None:
            number = float(value)
            logged.metrics.setdefault(str(name), []).extend([number] if isfinite(number) else [])

        return arguments | {"log_extra": log_extra, "log_metric": log_metric}


def _without_booleans(scores: Any) -> Any:
    """Return the scores with 1 for True and 0 for False, which TRL's trainers accept as well."""
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        return scores
    return [float(score) if isinstance(score, bool | np.bool_) else score for score in scores]


def _parameters(function: Callable[..., Any], where: str) -> tuple[set[str], bool, list[str]]:
    """Return the keyword parameters, whether the function takes any keyword, and the parameters without a default.

    Raises ConfigError for a required parameter that cannot be passed by keyword.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return set(), True, []
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        what = f"takes `{positional[0]}` by position only; reward functions are called by keyword"
        raise ConfigError(what, where, "remove the `/` from its parameters")
    takes = {p.name: p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return set(takes), takes_all, [name for name, required in takes.items() if required]


def function_arguments(
    rollouts: Rollouts, segments: list[list[str]] | None = None, columns: Iterable[str] | None = None
) -> dict[str, Any]:
    """Return the arguments of a reward function that come from the data.

    These are `prompts`, `completions`, `completion_ids`, the columns of the prompts and, for segment scores, the
    `segments` of the completions. All values are copies, one per completion, so that the prompts of a group share
    nothing.

    Args:
        columns: names of the columns; by default those that the prompts of this batch have.
    """
    contents: list[Content] = []
    completions: list[Content] = []
    for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True):
        content = deepcopy(prompt.content)
        if isinstance(content, str):
            completions.append(text)
        else:  # as in TRL, the completion includes the beginning of the response if the prompt has it
            begun = content.pop()["content"] if ends_with_assistant(content) else ""
            completions.append([{"role": "assistant", "content": begun + text}])
        contents.append(content)
    rows = zip(rollouts.response_tokens.cpu(), rollouts.response_mask.cpu(), strict=True)
    if columns is None:
        columns = dict.fromkeys(name for prompt in rollouts.prompts for name in prompt.columns)
    values = {name: [deepcopy(prompt.columns.get(name)) for prompt in rollouts.prompts] for name in columns}
    always = {"prompts": contents, "completions": completions, "completion_ids": [r[m].tolist() for r, m in rows]}
    return {**values, **always, **({} if segments is None else {"segments": deepcopy(segments)})}
