"""Who judges the answers: a reward model, a Python function, or a server. Nothing is ever turned into a number that
a scorer did not say."""

import asyncio
import importlib.util
import inspect
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import httpx

from keel.data.batches import Rollouts
from keel.errors import ConfigError, RewardError
from keel.models.reward_model import RewardModel


@dataclass(frozen=True)
class NoScore:
    """A scorer answered for this sample with something that is no score."""

    reason: str


Score = float | None | list[float] | list[tuple[str, float]] | NoScore
"""One score for the answer; None = not applicable; one per segment; (segment text, score) pairs; or a failure."""

MAX_RESPONSE_BYTES = 8 * 2**20
RETRYABLE = {408, 425, 429, 500, 502, 503, 504}


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
    weight: float
    noisy: bool
    timeout_seconds: float

    @property
    def name(self) -> str: ...


def build_scorers(sources: Sequence[Source], functions: Sequence[Callable[..., Any]] = ()) -> list[Scorer]:
    """Scorers of the settings, then functions handed over in Python, each with a name of its own."""
    scorers: list[Scorer] = []
    for source in sources:
        if source.model is not None:
            scorers.append(RewardModelScorer(source.model, source.name, source.weight))
        elif source.function is not None:
            function = load_function(source.function)
            scorers.append(FunctionScorer(function, source.name, source.weight, source.noisy))
        else:
            scorers.append(HttpScorer(str(source.url), source.name, source.weight, source.noisy, source.timeout_seconds))
    scorers += [FunctionScorer(function, getattr(function, "__name__", "function")) for function in functions]
    if not scorers:
        raise ConfigError("no scorer", where="rewards", fix="name a reward model, a function or a url under `rewards`")
    seen: dict[str, int] = {}
    for scorer in scorers:
        seen[scorer.name] = seen.get(scorer.name, 0) + 1
        if seen[scorer.name] > 1:
            scorer.name = f"{scorer.name}_{seen[scorer.name]}"
    return scorers


class RewardModelScorer:
    """A trained reward model, which reads text with its own tokenizer: ids never cross vocabularies."""

    noisy = False

    def __init__(self, folder: str, name: str, weight: float = 1.0) -> None:
        self.reward_model, self.name, self.weight = RewardModel.load(folder), name, weight

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        contents = [prompt.content for prompt in rollouts.prompts]
        if segments is None:
            return list(self.reward_model.score(contents, rollouts.texts).tolist())
        return self._differences(contents, segments)

    def _differences(self, contents: list[Any], segments: list[list[str]]) -> list[Score]:
        """A segment's score is what it adds: r(answer so far) - r(answer before), so the sum is the answer's score."""
        rows = [(content, "".join(parts[: k + 1])) for content, parts in zip(contents, segments, strict=True)
                for k in range(len(parts))]  # fmt: skip
        flat = iter(self.reward_model.score([content for content, _ in rows], [text for _, text in rows]).tolist())
        result: list[Score] = []
        for parts in segments:
            sums = [0.0] + [next(flat) for _ in parts]
            result.append([after - before for before, after in zip(sums, sums[1:], strict=False)])
        return result


class FunctionScorer:
    """A Python function with the signature of TRL's reward functions, sync or async."""

    def __init__(self, function: Callable[..., Any], name: str, weight: float = 1.0, noisy: bool = False) -> None:
        self.function, self.name, self.weight, self.noisy = function, name, weight, noisy
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self.takes = {parameter.name for parameter in parameters}

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        arguments = function_arguments(rollouts)
        if not self.takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self.takes}
        try:
            answer = self.function(**arguments)
            if inspect.isawaitable(answer):
                answer = asyncio.run(_result(answer))
        except Exception as error:  # a user's function may raise anything; its own words are the message
            raise RewardError(f"{type(error).__name__}: {error}", where=f"reward function {self.name}") from error
        return checked(answer, rollouts, f"reward function {self.name}")


class HttpScorer:
    """A server: POST {"query": [prompt + answer], "prompts": [prompt]} -> {"rewards": [number]}."""

    def __init__(self, url: str, name: str, weight: float, noisy: bool, timeout_seconds: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no http(s) address", where="rewards.url")
        self.url, self.name, self.weight, self.noisy, self.timeout_seconds = url, name, weight, noisy, timeout_seconds

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        prompts = [prompt.text for prompt in rollouts.prompts]
        body = {"query": [p + text for p, text in zip(prompts, rollouts.texts, strict=True)], "prompts": prompts}
        if segments is not None:
            body["segments"] = segments  # type: ignore[assignment]
        answer = self._post(body)
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise RewardError('the answer has no field "rewards"', where=self.url)
        return checked(answer["rewards"], rollouts, self.url)

    def _post(self, body: dict[str, Any]) -> Any:
        """Try until the deadline, with growing pauses, as long as the failure can pass."""
        deadline, pause, attempt = time.monotonic() + self.timeout_seconds, 0.5, 0
        while True:
            attempt += 1
            try:
                return self._post_once(body, deadline)
            except (httpx.TransportError, _Passing) as error:
                if time.monotonic() + pause > deadline:
                    reason = f"no answer within {self.timeout_seconds:g} s ({attempt} attempts; last: {error!r})"
                    raise RewardError(reason, where=self.url, fix="start the server, then --resume") from error
                time.sleep(pause)
                pause = min(2 * pause, 10.0)

    def _post_once(self, body: dict[str, Any], deadline: float) -> Any:
        left = max(0.1, deadline - time.monotonic())
        chunks, size = [], 0
        with httpx.stream("POST", self.url, json=body, timeout=left, follow_redirects=False) as response:
            if response.status_code in RETRYABLE:
                raise _Passing(f"HTTP {response.status_code}")
            if response.status_code != 200:
                raise RewardError(f"HTTP {response.status_code}", where=self.url)
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_RESPONSE_BYTES:
                    raise RewardError(f"the answer is larger than {MAX_RESPONSE_BYTES} bytes", where=self.url)
                if time.monotonic() > deadline:
                    raise _Passing("the answer dripped past the deadline")
        try:
            return httpx.Response(200, content=b"".join(chunks)).json()
        except ValueError:
            raise RewardError("the answer is no JSON", where=self.url) from None


class _Passing(Exception):
    """A failure that another attempt may not meet."""


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def function_arguments(rollouts: Rollouts) -> dict[str, Any]:
    """The keywords a reward function is called with: prompts, completions, completion_ids and the data's columns."""
    contents = [prompt.content for prompt in rollouts.prompts]
    completions = [
        text if isinstance(content, str) else [{"role": "assistant", "content": text}]
        for content, text in zip(contents, rollouts.texts, strict=True)
    ]
    rows = zip(rollouts.response_tokens.cpu(), rollouts.response_mask.cpu(), strict=True)
    names = dict.fromkeys(name for prompt in rollouts.prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in rollouts.prompts] for name in names}
    given = {"prompts": contents, "completions": completions, "completion_ids": [r[m].tolist() for r, m in rows]}
    return {**columns, **given}


def load_function(place: str) -> Callable[..., Any]:
    """FILE.py:NAME to the function. Raises ConfigError."""
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise ConfigError("no such file", where=place, fix="give FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(f"{type(error).__name__} on import: {error}", where=file) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"no function {name!r}", where=file)
    return function  # type: ignore[no-any-return]


def checked(answer: Any, rollouts: Rollouts, where: str) -> list[Score]:
    """A scorer's answer as one score a sample; RewardError unless it is a list of the right length."""
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        raise RewardError(f"expected a list of rewards, got {type(answer).__name__}", where=where)
    if len(answer) != len(rollouts.texts):
        raise RewardError(f"expected {len(rollouts.texts)} rewards, got {len(answer)}", where=where)
    return [_checked_score(score) for score in answer]


def _checked_score(score: Any) -> Score:
    if hasattr(score, "tolist"):
        score = score.tolist()
    if score is None:
        return None
    try:
        if not isinstance(score, list | tuple):
            return _number(score)
        if score and all(isinstance(part, list | tuple) and len(part) == 2 for part in score):
            return [(str(text), _number(value)) for text, value in score]
        return [_number(part) for part in score]
    except ValueError as error:
        return NoScore(str(error))


def _number(value: Any) -> float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str | bytes) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"reward {value!r} is no finite number")
    return float(value)
