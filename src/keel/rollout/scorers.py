"""Who judges the answers: a reward model, a Python function, or a server. Nothing is ever turned into a number that
a scorer did not say."""

import importlib.util
import inspect
import traceback
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

from keel.data.batches import Rollouts
from keel.data.chats import tools_of
from keel.data.messages import Content, ends_with_assistant
from keel.errors import ConfigError, RewardError
from keel.models.ensemble import RewardEnsemble, load_reward_model, models_of
from keel.models.reward_model import RewardModel
from keel.rollout.http import HttpScorer
from keel.rollout.scores import Score, checked
from keel.rollout.waiting import outcome


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
    timeout_seconds: float
    std_coef: float

    @property
    def combine(self) -> str: ...
    @property
    def name(self) -> str: ...


def build_scorers(sources: Sequence[Source], functions: Sequence[Callable[..., Any]] = ()) -> list[Scorer]:
    """Scorers of the settings, then functions handed over in Python, each with a name of its own."""
    scorers: list[Scorer] = []
    for source in sources:
        if source.model is not None:
            judge = load_reward_model(source.model, source.combine, source.std_coef, source.chat_template)
            scorers.append(RewardModelScorer(judge, source.name, source.weight))
        elif source.function is not None:
            function = load_function(source.function)
            scorers.append(FunctionScorer(function, source.name, source.weight, source.noisy))
        else:
            scorers.append(
                HttpScorer(str(source.url), source.name, source.weight, source.noisy, source.timeout_seconds)
            )
    scorers += [
        FunctionScorer(function, getattr(function, "__name__", "function"), noisy=getattr(function, "noisy", False))
        for function in functions
    ]
    if not scorers:
        raise ConfigError("no scorer", where="rewards", fix="name a reward model, a function or a url under `rewards`")
    seen: dict[str, int] = {}
    for scorer in scorers:
        seen[scorer.name] = seen.get(scorer.name, 0) + 1
        if seen[scorer.name] > 1:
            scorer.name = f"{scorer.name}_{seen[scorer.name]}"
    return scorers


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
        return models_of(self.judge)

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        contents = [prompt.content for prompt in rollouts.prompts]
        tools = [tools_of(prompt.columns) for prompt in rollouts.prompts]
        truncated = rollouts.truncated.tolist()
        if segments is None:
            return self._scores(contents, rollouts.texts, truncated, tools)
        return self._differences(contents, segments, truncated, tools)

    def _scores(self, *read: list[Any]) -> list[Score]:
        """Scores of prompts, responses, whether those were truncated, and the prompts' tools."""
        if not isinstance(self.judge, RewardEnsemble):
            scores = list(self.judge.score(*read).tolist())
            self.cut = list(self.judge.cut)
            return scores
        said = self.judge.member_scores(*read)
        self.cut = self.judge.cut
        self.disagreement = said.std(0, correction=0).tolist()
        return list(self.judge.combined(said).tolist())

    def _differences(
        self, contents: list[Any], segments: list[list[str]], truncated: list[bool], tools: list[Any]
    ) -> list[Score]:
        """A segment's score is what it adds: r(answer so far) - r(answer before), so the sum is the answer's score."""
        rows = [
            (content, "".join(parts[: k + 1]), was_cut and k + 1 == len(parts), given)
            for content, parts, was_cut, given in zip(contents, segments, truncated, tools, strict=True)
            for k in range(len(parts))
        ]
        flat = iter(self.judge.score(*map(list, zip(*rows, strict=True))).tolist())
        last = accumulate(len(parts) for parts in segments)
        self.cut = [self.judge.cut[end - 1] for end in last]  # the last row of each response is its full text
        result: list[Score] = []
        for parts in segments:
            sums = [0.0] + [next(flat) for _ in parts]
            result.append([after - before for before, after in pairwise(sums)])
        return result


class FunctionScorer:
    """A Python function with the signature of TRL's reward functions, sync or async."""

    def __init__(self, function: Callable[..., Any], name: str, weight: float = 1.0, noisy: bool = False) -> None:
        self.function, self.name, self.weight, self.noisy = function, name, weight, noisy
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self.takes = {parameter.name for parameter in parameters}

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        arguments = function_arguments(rollouts, segments)
        if not self.takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self.takes}
        try:
            answer = self.function(**arguments)
            if inspect.isawaitable(answer):
                answer = outcome(answer)
        except (Exception, SystemExit) as error:  # a user's function may raise anything; its own words are the message
            place = f"reward function {self.name}{_line_of(error, self.function)}"
            raise RewardError(f"{type(error).__name__}: {error}", place, "mend it, then --resume") from error
        return checked(answer, rollouts, f"reward function {self.name}")


def _line_of(error: BaseException, function: Callable[..., Any]) -> str:
    """Where in the function's own file it failed, such as ` (my.py:7)`."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(str(file)).name}:{lines[-1]})" if lines else ""


def function_arguments(rollouts: Rollouts, segments: list[list[str]] | None = None) -> dict[str, Any]:
    """The keywords a reward function is called with: prompts, completions, completion_ids, the data's columns and,
    when segment scores are wanted, the completions' `segments`."""
    contents: list[Content] = []
    completions: list[Content] = []
    for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True):
        asked = prompt.content
        if isinstance(asked, str):
            completions.append(text)
        else:  # as TRL has it, an answer that was begun in the prompt is all in the completion
            begun = asked[-1]["content"] if ends_with_assistant(asked) else ""
            asked = asked[:-1] if ends_with_assistant(asked) else asked
            completions.append([{"role": "assistant", "content": begun + text}])
        contents.append(asked)
    rows = zip(rollouts.response_tokens.cpu(), rollouts.response_mask.cpu(), strict=True)
    names = dict.fromkeys(name for prompt in rollouts.prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in rollouts.prompts] for name in names}
    given = {"prompts": contents, "completions": completions, "completion_ids": [r[m].tolist() for r, m in rows]}
    return {**columns, **given, **({} if segments is None else {"segments": segments})}


def load_function(place: str) -> Callable[..., Any]:
    """FILE.py:NAME to the function. Raises ConfigError."""
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise ConfigError("no such file", where=place, fix="give FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(f"{type(error).__name__} on import: {error}", where=file) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"no function {name!r}", where=file)
    return function
