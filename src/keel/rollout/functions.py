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
from keel.errors import ConfigError, RewardError
from keel.rollout.event_loop import EventLoop
from keel.rollout.foreign import Deadline, error_line, process_kept, reported_when_slow
from keel.rollout.reward_file import Home
from keel.rollout.score_check import Score, check_scores

ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a function is called with whatever the data are."""


@dataclass
class Logged:
    """What a function logged of one batch."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)  # name -> a value for each completion


class FunctionScorer:
    """A Python function with the signature of TRL's reward functions, sync or async.

    It gets copies: what it changes in its arguments changes nothing of the run.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, weight: float = 1.0, noisy: bool = False, where: str = ""
    ) -> None:
        self.function, self.name, self.weight, self.noisy = function, name, weight, noisy
        self.place, self.where = f"reward function {name}", where or f"reward function {name}"
        self.takes, self.takes_all, self.required = _parameters(function, self.where)
        self.columns: list[str] | None = None  # of all prompts, once they are known
        self.progress = (1, 1)  # steps done, of how many; outside of training as at its end
        self.logged = Logged()
        self._loop = EventLoop()
        self._home: Home | None = None
        self._deadline: Deadline | None = None

    def within(self, home: Home, timeout_seconds: float | None) -> Self:
        """The same with the folder that its code imports from, and a deadline for each batch."""
        self._home, self._deadline = home, Deadline(timeout_seconds) if timeout_seconds else None
        return self

    def check(self, columns: list[str], segments: bool) -> None:
        """Fix the columns that every call hands over. Raises ConfigError where not all it needs is among them."""
        self.columns = columns
        needless = [name for name in columns if name in ALWAYS[:3] and (self.takes_all or name in self.takes)]
        if needless:
            raise ConfigError(
                f"`{self.name}` takes `{needless[0]}`, which the prompts have as a column and keel passes itself",
                where=self.where,
                fix="rename the column",
            )
        complaint = self._complaint(columns, segments)
        if complaint:
            raise ConfigError(complaint, self.where, "rename the parameter, give it a default, or add the column")

    def _complaint(self, columns: list[str], segments: bool) -> str:
        """What is wrong with its parameters, beside what it is called with; empty where nothing is."""
        given = [*ALWAYS, *(["segments"] if segments else []), *columns]
        missing = [name for name in self.required if name not in given]
        if not missing and (self.takes_all or self.takes & set(given)):
            return ""
        own = f"your columns: {', '.join(columns)}" if columns else "the other columns of the prompts, which have none"
        needs = f"takes `{missing[0]}`" if missing else "takes none of what it would be called with"
        always = ", ".join(f"`{name}`" for name in ALWAYS)
        return f"`{self.name}` {needs}; reward functions are called with {always} and {own}"

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        self.logged = Logged()
        own = function_arguments(rollouts, segments, self.columns)
        if self.columns is None and (complaint := self._complaint(list(own), segments is not None)):
            raise RewardError(complaint, self.place)
        given = own | self._from_trl(len(rollouts.texts))
        arguments = {name: value for name, value in given.items() if self.takes_all or name in self.takes}

        def call() -> Any:
            scores = self.function(**arguments)
            return self._loop.outcome(scores) if inspect.isawaitable(scores) else scores

        home: AbstractContextManager[None] = self._home.importable() if self._home else nullcontext()
        try:
            with process_kept(self.place), home, reported_when_slow(self.place, "timeout_seconds sets a deadline"):
                scores = self._deadline.run(call) if self._deadline else call()
                # Reading the scores runs code of the function's types.
                return check_scores(_without_booleans(scores), rollouts, self.place)
        except (KeyboardInterrupt, RewardError):
            raise
        except BaseException as error:  # whatever it raises, sys.exit and panics of Rust libraries included
            file = getattr(getattr(self.function, "__code__", None), "co_filename", None)
            place = f"{self.place}{error_line(error, file)}"
            raise RewardError(f"{type(error).__name__}: {error}", place, "fix the function") from error

    def _from_trl(self, count: int) -> dict[str, Any]:
        """What TRL's trainers hand over besides the data."""
        found: dict[str, Any] = {}
        if self.takes_all or "trainer_state" in self.takes:
            from transformers import TrainerState

            done, total = self.progress
            found["trainer_state"] = TrainerState(global_step=done, max_steps=total, epoch=done / total)
        logged = self.logged

        def log_extra(column: str, values: Iterable[Any]) -> None:
            plain = json.loads(json.dumps(list(values), default=str))
            if len(plain) != count:
                raise RewardError(f"log_extra({column!r}): expected {count} values, got {len(plain)}", self.place)
            logged.columns[str(column)] = plain

        def log_metric(name: str, value: float) -> None:
            number = float(value)
            logged.metrics.setdefault(str(name), []).extend([number] if isfinite(number) else [])

        return found | {"log_extra": log_extra, "log_metric": log_metric}


def _without_booleans(scores: Any) -> Any:
    """The scores with 1 for True and 0 for False, as TRL's trainers take them."""
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        return scores
    return [float(score) if isinstance(score, bool | np.bool_) else score for score in scores]


def _parameters(function: Callable[..., Any], where: str) -> tuple[set[str], bool, list[str]]:
    """Names that can be given as keywords, whether any can, and those without a default. Raises ConfigError."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C
        return set(), True, []
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if by_place:
        what = f"takes `{by_place[0]}` by position only; reward functions are called by keyword"
        raise ConfigError(what, where, "remove the `/` from its parameters")
    takes = {p.name: p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return set(takes), takes_all, [name for name, required in takes.items() if required]


def function_arguments(
    rollouts: Rollouts, segments: list[list[str]] | None = None, columns: Iterable[str] | None = None
) -> dict[str, Any]:
    """What a reward function reads: prompts, completions, completion_ids, the data's columns (by default those that the
    prompts of this batch have) and, when segment scores are wanted, the completions' `segments`. All are copies, one
    for each completion: prompts of a group share nothing."""
    contents: list[Content] = []
    completions: list[Content] = []
    for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True):
        asked = deepcopy(prompt.content)
        if isinstance(asked, str):
            completions.append(text)
        else:  # as TRL has it, a response that was begun in the prompt is all in the completion
            begun = asked.pop()["content"] if ends_with_assistant(asked) else ""
            completions.append([{"role": "assistant", "content": begun + text}])
        contents.append(asked)
    rows = zip(rollouts.response_tokens.cpu(), rollouts.response_mask.cpu(), strict=True)
    if columns is None:
        columns = dict.fromkeys(name for prompt in rollouts.prompts for name in prompt.columns)
    values = {name: [deepcopy(prompt.columns.get(name)) for prompt in rollouts.prompts] for name in columns}
    given = {"prompts": contents, "completions": completions, "completion_ids": [r[m].tolist() for r, m in rows]}
    return {**values, **given, **({} if segments is None else {"segments": deepcopy(segments)})}
