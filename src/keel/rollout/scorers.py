"""Who judges the answers: a reward model, a Python function, or a server. Nothing is ever turned into a number that
a scorer did not say."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

from keel.data.batches import Rollouts
from keel.data.chats import read_tools
from keel.errors import ConfigError
from keel.models.ensemble import RewardEnsemble, load_reward_model, member_models
from keel.models.heads import plain
from keel.models.reading import Reading
from keel.models.reward_model import RewardModel
from keel.naming import clean_name, free_name
from keel.rollout.functions import FunctionScorer
from keel.rollout.http import DEADLINE_SECONDS, HttpScorer
from keel.rollout.reward_file import forget_files, load_function
from keel.rollout.score_check import Score


class Scorer(Protocol):
    name: str
    weight: float
    noisy: bool

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        """One score an answer, in order; `segments` are the answers' parts when segment scores are wanted."""


class Source(Protocol):
    """Where a scorer comes from: exactly one of model, function, url."""

    model: str | None
    function: str | None
    url: str | None
    chat_template: str | None
    weight: float
    noisy: bool
    timeout_seconds: float | None
    std_coef: float

    @property
    def combine(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def label(self) -> str: ...


def build_scorers(sources: Sequence[Source], functions: Sequence[Callable[..., Any]] = ()) -> list[Scorer]:
    """Scorers of the settings, under the names they have there, then functions handed over in Python.

    Raises ConfigError without any, and for one that cannot be loaded or called.
    """
    forget_files()
    scorers = [_build(source, f"rewards[{place}]") for place, source in enumerate(sources)]
    for place, function in enumerate(_checked_functions(functions)):
        name = free_name(function_name(function), [scorer.name for scorer in scorers])
        noisy = bool(getattr(function, "noisy", False))
        scorers.append(FunctionScorer(function, name, noisy=noisy, where=f"scorers[{place}]"))
    if not scorers:
        raise ConfigError("no scorer", where="rewards", fix="name a reward model, a function or a url under `rewards`")
    return scorers


def _checked_functions(functions: Any) -> Sequence[Callable[..., Any]]:
    """The functions handed over in Python. Raises ConfigError for anything but a list or tuple of them."""
    if not isinstance(functions, list | tuple):
        kind = type(functions).__name__
        raise ConfigError(f"expected a list of functions, got {kind}", where="scorers", fix="give scorers=[function]")
    for place, function in enumerate(functions):
        if not callable(function):
            raise ConfigError(
                f"expected a function, got {type(function).__name__}",
                where=f"scorers[{place}]",
                fix="give the function itself; name FILE.py:NAME in `rewards`",
            )
    return functions


def _build(source: Source, where: str) -> Scorer:
    if source.model is not None:
        judge = load_reward_model(source.model, source.combine, source.std_coef, source.chat_template, source.dtype)
        return RewardModelScorer(judge, source.label, source.weight)
    if source.function is not None:
        function, home = load_function(source.function)
        scorer = FunctionScorer(function, source.label, source.weight, source.noisy, f"{where}.function")
        return scorer.within(home, source.timeout_seconds)
    seconds = source.timeout_seconds or DEADLINE_SECONDS
    return HttpScorer(str(source.url), source.label, source.weight, source.noisy, seconds)


def function_name(function: Callable[..., Any]) -> str:
    """Of a function its name, of functools.partial that of what it calls, of another object that of its class."""
    function = function.func if isinstance(function, partial) else function
    return clean_name(getattr(function, "__name__", type(function).__name__)) or "function"


def check_signatures(scorers: Sequence[Scorer], columns: Iterable[str], segments: bool = False) -> None:
    """Raises ConfigError for a function that takes what nobody gives: `columns` are those of the prompts."""
    known = list(dict.fromkeys(columns))
    for scorer in scorers:
        if isinstance(scorer, FunctionScorer):
            scorer.check(known, segments)


class RewardModelScorer:
    """A trained reward model or an ensemble, which reads text with its own tokenizer: ids never cross vocabularies."""

    noisy = False
    disagreement: list[float] | None = None  # of an ensemble's members over each answer of the last call
    cut: list[bool] | None = None  # for each response of the last call whether the text was too long to be read in full

    def __init__(self, judge: RewardModel | RewardEnsemble, name: str, weight: float = 1.0) -> None:
        self.judge, self.name, self.weight = judge, name, weight
        for member in self.members:
            member.model.requires_grad_(False)

    @property
    def members(self) -> list[RewardModel]:
        return member_models(self.judge)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return min(plain(member.model).dtype.itemsize for member in self.members)

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        readings = [
            Reading(prompt.content, text, was_cut, read_tools(prompt.columns))
            for prompt, text, was_cut in zip(rollouts.prompts, rollouts.texts, rollouts.truncated.tolist(), strict=True)
        ]
        return self._scores(readings) if segments is None else self._differences(readings, segments)

    def _scores(self, readings: list[Reading]) -> list[Score]:
        if not isinstance(self.judge, RewardEnsemble):
            scores = list(self.judge.score_readings(readings).tolist())
            self.cut = list(self.judge.cut)
            return scores
        said = self.judge.member_scores(readings)
        self.cut = self.judge.cut
        self.disagreement = said.std(0, correction=0).tolist()
        return list(self.judge.combine_scores(said).tolist())

    def _differences(self, readings: list[Reading], segments: list[list[str]]) -> list[Score]:
        """A segment's score is what it adds: r(answer so far) - r(answer before), so the sum is the answer's score."""
        rows = [
            replace(whole, response="".join(parts[:k]), truncated=whole.truncated and k == len(parts))
            for whole, parts in zip(readings, segments, strict=True)
            for k in range(1, len(parts) + 1)
        ]
        flat = iter(self.judge.score_readings(rows).tolist() if rows else [])
        last = accumulate(len(parts) for parts in segments)
        self.cut = [self.judge.cut[end - 1] for end in last]  # the last row of each response is its full text
        result: list[Score] = []
        for parts in segments:
            sums = [0.0] + [next(flat) for _ in parts]
            result.append([after - before for before, after in pairwise(sums)])
        return result
