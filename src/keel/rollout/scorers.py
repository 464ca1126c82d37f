"""Scorers: what scores responses, such as a reward model, a Python function or a server."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

from keel.data.batches import Rollouts
from keel.data.chats import read_tools
from keel.errors import ConfigError
from keel.judge.judge import Judge, JudgeSource
from keel.judge.questions import MOST_RESPONSES
from keel.models.ensemble import RewardEnsemble, load_reward_model, member_models
from keel.models.heads import unwrap_model
from keel.models.reading import Reading
from keel.models.reward_model import RewardModel
from keel.naming import clean_name, free_name
from keel.rollout.function_scorer import FunctionScorer
from keel.rollout.http_scorer import DEADLINE_SECONDS, HttpScorer
from keel.rollout.judge_scorer import JudgeScorer
from keel.rollout.reward_file import forget_files, load_function
from keel.rollout.score_check import Score


class Scorer(Protocol):
    name: str
    weight: float
    noisy: bool

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        """Return one score per response, in order.

        Args:
            segments: the segments of each response, for segment scores.
        """


class ScorerJudgeSource(JudgeSource, Protocol):
    """The settings of a judge as a scorer."""

    scale: tuple[int, int]

    @property
    def mode(self) -> str: ...


class Source(Protocol):
    """The settings of a scorer. Exactly one of model, function, url and judge is set."""

    model: str | None
    function: str | None
    url: str | None
    chat_template: str | None
    weight: float
    noisy: bool
    timeout_seconds: float | None
    std_coef: float

    @property
    def judge(self) -> ScorerJudgeSource | None: ...
    @property
    def combine(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def label(self) -> str: ...


def build_scorers(
    sources: Sequence[Source], functions: Sequence[Callable[..., Any]] = (), group_size: int = MOST_RESPONSES
) -> list[Scorer]:
    """Build the scorers of the settings, then those of functions passed in Python.

    Args:
        group_size: number of responses to a prompt, which a judge compares with each other.

    Raises ConfigError if there is none, and for a scorer that cannot be loaded or called.
    """
    forget_files()
    scorers = [_build(source, f"rewards[{index}]", group_size) for index, source in enumerate(sources)]
    for index, function in enumerate(_check_functions(functions)):
        name = free_name(function_name(function), [scorer.name for scorer in scorers])
        noisy = bool(getattr(function, "noisy", False))
        scorers.append(FunctionScorer(function, name, noisy=noisy, where=f"scorers[{index}]"))
    if not scorers:
        raise ConfigError("no scorer", where="rewards", fix="name a reward model, a function or a url under `rewards`")
    return scorers


def _check_functions(functions: Any) -> Sequence[Callable[..., Any]]:
    """Return the functions passed in Python. Raises ConfigError unless they are a list or tuple of functions."""
    if not isinstance(functions, list | tuple):
        kind = type(functions).__name__
        raise ConfigError(f"expected a list of functions, got {kind}", where="scorers", fix="pass scorers=[function]")
    for index, function in enumerate(functions):
        if not callable(function):
            raise ConfigError(
                f"expected a function, got {type(function).__name__}",
                where=f"scorers[{index}]",
                fix="pass the function itself; FILE.py:NAME belongs in `rewards`",
            )
    return functions


def _build(source: Source, where: str, group_size: int) -> Scorer:
    if source.model is not None:
        reward_model = load_reward_model(
            source.model, source.combine, source.std_coef, source.chat_template, source.dtype
        )
        return RewardModelScorer(reward_model, source.label, source.weight)
    if source.function is not None:
        function, folder = load_function(source.function)
        scorer = FunctionScorer(function, source.label, source.weight, source.noisy, f"{where}.function")
        return scorer.within(folder, source.timeout_seconds)
    if source.judge is not None:
        judge, mode = Judge(source.judge, f"{where}.judge"), source.judge.mode
        return JudgeScorer(judge, mode, source.judge.scale, source.label, source.weight, source.noisy, group_size)
    seconds = source.timeout_seconds or DEADLINE_SECONDS
    return HttpScorer(str(source.url), source.label, source.weight, source.noisy, seconds)


def function_name(function: Callable[..., Any]) -> str:
    """Return the name of a function, of the function in a functools.partial, or of the class of another object."""
    function = function.func if isinstance(function, partial) else function
    return clean_name(getattr(function, "__name__", type(function).__name__)) or "function"


def check_signatures(scorers: Sequence[Scorer], columns: Iterable[str], segments: bool = False) -> None:
    """Raise ConfigError for a function with a required parameter that it is not called with.

    Args:
        columns: names of the columns of the prompts.
    """
    distinct = list(dict.fromkeys(columns))
    for scorer in scorers:
        if isinstance(scorer, FunctionScorer):
            scorer.check(distinct, segments)


class RewardModelScorer:
    """A trained reward model or an ensemble.

    It gets responses as text and encodes them with its tokenizer: token ids are never passed between vocabularies.
    """

    noisy = False
    disagreement: list[float] | None = None  # deviation of an ensemble's scores of each response of the last call
    cut: list[bool] | None = None  # whether the text of each response of the last call was too long to be read in full

    def __init__(self, reward_model: RewardModel | RewardEnsemble, name: str, weight: float = 1.0) -> None:
        self.reward_model, self.name, self.weight = reward_model, name, weight
        for member in self.members:
            member.model.requires_grad_(False)

    @property
    def members(self) -> list[RewardModel]:
        return member_models(self.reward_model)

    @property
    def itemsize(self) -> int:
        """Bytes per weight; the smallest of an ensemble."""
        return min(unwrap_model(member.model).dtype.itemsize for member in self.members)

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        readings = [
            Reading(prompt.content, text, was_cut, read_tools(prompt.columns))
            for prompt, text, was_cut in zip(rollouts.prompts, rollouts.texts, rollouts.truncated.tolist(), strict=True)
        ]
        return self._scores(readings) if segments is None else self._segment_scores(readings, segments)

    def _scores(self, readings: list[Reading]) -> list[Score]:
        if not isinstance(self.reward_model, RewardEnsemble):
            scores = list(self.reward_model.score_readings(readings).tolist())
            self.cut = list(self.reward_model.cut)
            return scores
        scores_by_member = self.reward_model.member_scores(readings)
        self.cut = self.reward_model.cut
        self.disagreement = scores_by_member.std(0, correction=0).tolist()
        return list(self.reward_model.combine_scores(scores_by_member).tolist())

    def _segment_scores(self, readings: list[Reading], segments: list[list[str]]) -> list[Score]:
        """Return what each segment adds to the score of the text up to its end. They add up to the response's score."""
        prefixes = [
            replace(reading, response="".join(texts[:k]), truncated=reading.truncated and k == len(texts))
            for reading, texts in zip(readings, segments, strict=True)
            for k in range(1, len(texts) + 1)
        ]
        scores = iter(self.reward_model.score_readings(prefixes).tolist())
        last = accumulate(len(texts) for texts in segments)
        self.cut = [self.reward_model.cut[end - 1] for end in last]  # the last prefix of each response is its full text
        result: list[Score] = []
        for texts in segments:
            sums = [0.0] + [next(scores) for _ in texts]
            result.append([end - start for start, end in pairwise(sums)])
        return result
