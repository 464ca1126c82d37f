"""A judge: asks a language model behind an OpenAI-compatible endpoint, and counts what that costs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from keel.data.messages import Messages
from keel.endpoints.client import JUDGE_KEY, EndpointClient, Refusal
from keel.errors import ConfigError, EngineError, RewardError
from keel.files import read_regular
from keel.judge.cache import ReplyCache
from keel.judge.questions import Question, QuestionWriter, retry_messages

ATTEMPTS = 3
"""Number of times that a question is asked until its reply can be read."""
SEED = 0


class JudgeSource(Protocol):
    """The settings of a judge."""

    url: str
    model: str
    rubric: str
    reasons: bool
    max_tokens: int
    cache: str
    input_price: float
    output_price: float
    timeout_seconds: float


@dataclass
class Usage:
    """What a judge was asked, and what that cost."""

    requests: float = 0.0  # sent to the endpoint and replied to
    cached: float = 0.0  # questions for which no request was needed
    malformed: float = 0.0  # replies that could not be read
    failed: float = 0.0  # questions without a verdict
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    cost: float = 0.0

    def plus(self, other: "Usage") -> "Usage":
        return Usage(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


USAGE = tuple(each.name for each in fields(Usage))


@dataclass(frozen=True)
class NoVerdict:
    """The reason for which a question has no verdict."""

    reason: str


@dataclass
class _Batch:
    """The questions of one call, by their keys."""

    questions: dict[str, Question]
    messages: dict[str, Messages]  # of the questions that are still open
    verdicts: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # why a question has no verdict so far
    refused: set[str] = field(default_factory=set)


class Judge:
    """A language model that evaluates responses by a rubric. Its replies are greedy, and cached by content."""

    def __init__(self, settings: JudgeSource, where: str = "judge") -> None:
        """Read the rubric and open the cache. Raises ConfigError."""
        self.settings = settings
        self.rubric = read_rubric(settings.rubric, where)
        self.writer = QuestionWriter(self.rubric, settings.reasons)
        on_failure = f"start the server, or raise {where}.timeout_seconds; the replies so far are in the cache"
        self.client = EndpointClient(
            settings.url.rstrip("/"), settings.model, settings.timeout_seconds, JUDGE_KEY, f"{where}.url", on_failure
        )
        self.cache = ReplyCache(settings.cache)
        self.structured = True  # whether the endpoint takes a schema for its replies, as far as is known
        self.usage = Usage()

    def take_usage(self) -> Usage:
        """Return the usage since the last call."""
        usage, self.usage = self.usage, Usage()
        return usage

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """Return the verdict on each question, or NoVerdict after ATTEMPTS replies that cannot be read, or a refusal.

        Raises RewardError if the endpoint cannot be used, or does not reply within the deadline.
        """
        keys = [self._key(question) for question in questions]
        distinct = dict(zip(keys, questions, strict=True))
        batch = _Batch(distinct, {})
        for key, reply in self.cache.read(distinct).items():
            self._read(batch, key, reply)
        batch.messages = {key: each.messages for key, each in distinct.items() if key not in batch.verdicts}
        self.usage.cached += len(questions) - len(batch.messages)
        for _ in range(ATTEMPTS):
            self._ask_open_questions(batch)
        self.usage.failed += sum(key not in batch.verdicts for key in keys)
        return [batch.verdicts[key] if key in batch.verdicts else NoVerdict(batch.reasons[key]) for key in keys]

    def _ask_open_questions(self, batch: _Batch) -> None:
        """Ask all open questions once. Those with a reply that cannot be read stay open."""
        keys = list(batch.messages)
        if not keys:
            return

        def received(index: int, reply: Any) -> None:
            self._receive(batch, keys[index], reply)

        batch.refused = set()
        bodies = [self._body(batch.messages[key], batch.questions[key]) for key in keys]
        try:
            self.client.complete(bodies, received)
        except EngineError as error:
            raise RewardError(error.what, error.where, error.fix) from error
        if self.structured and len(batch.refused) == len(keys):
            # Some endpoints take no schema. If they refuse the request without one too, that was not the reason.
            self.structured = False
            self._ask_open_questions(batch)
            self.structured = len(batch.refused) == len(keys)
        for key in batch.refused:
            batch.messages.pop(key, None)

    def _receive(self, batch: _Batch, key: str, reply: Any) -> None:
        """Count and read a reply. A verdict is in the cache before the next reply is read."""
        self.usage.requests += 1
        if isinstance(reply, Refusal):
            batch.refused.add(key)
            batch.reasons[key] = reply.reason
            return
        text, finish_reason, counts = read_reply_text(reply, self.settings.url)
        price = (self.settings.input_price, self.settings.output_price)
        self.usage.input_tokens += counts[0]
        self.usage.output_tokens += counts[1]
        self.usage.cost += sum(count * each / 1e6 for count, each in zip(counts, price, strict=True))
        error = self._read(batch, key, text) if finish_reason != "length" else "The reply is too long"
        if error is None:
            self.cache.record(key, self.settings.model, text)
            del batch.messages[key]
            return
        self.usage.malformed += 1
        batch.reasons[key] = error
        batch.messages[key] = retry_messages(batch.questions[key].messages, text, error)

    def _read(self, batch: _Batch, key: str, text: str) -> str | None:
        """Read the verdict of a reply. Return what is wrong with it, or None."""
        try:
            batch.verdicts[key] = batch.questions[key].parse(text)
        except ValueError as error:
            return str(error)
        return None

    def _body(self, messages: Messages, question: Question) -> dict[str, Any]:
        schema = {"name": "verdict", "strict": True, "schema": question.schema}
        return {
            "messages": messages,
            "max_tokens": self.settings.max_tokens,
            "temperature": 0.0,
            "seed": SEED,
            **({"response_format": {"type": "json_schema", "json_schema": schema}} if self.structured else {}),
        }

    def _key(self, question: Question) -> str:
        """Return the hash of all that a verdict depends on. The address is not part of it."""
        content = [self.settings.model, question.messages, question.properties, self.settings.max_tokens]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_rubric(path: str, where: str) -> str:
    """Read a rubric. Raises ConfigError for a file that cannot be read, is not text or is empty."""
    try:
        text = read_regular(Path(path)).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", f"{where}.rubric", "name a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", f"{where}.rubric", "save the file as UTF-8") from error
    if not text.strip():
        raise ConfigError(f"{path} is empty", f"{where}.rubric", "describe what makes a response good")
    return text


def read_reply_text(reply: Mapping[str, Any], where: str) -> tuple[str, str, tuple[int, int]]:
    """Return the text of a chat completion, why it ended, and the numbers of tokens read and written.

    Raises EngineError for a reply of another form.
    """
    try:
        choice, usage = reply["choices"][0], reply["usage"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        counts = usage["prompt_tokens"], usage["completion_tokens"]
    except (KeyError, TypeError, IndexError):
        raise EngineError("a reply lacks its text, finish reason or usage", where, "check the address") from None
    if any(type(count) is not int or count < 0 for count in counts):
        raise EngineError("a reply lacks its numbers of tokens", where, "check the address")
    # Half of a surrogate pair, which JSON can spell, is no character, and cannot be stored.
    return text.encode(errors="replace").decode() if isinstance(text, str) else "", str(reason), counts
