"""A scorer behind HTTP, with the contract that `rewards: [{url: ...}]` speaks (OpenRLHF's)."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from keel.config import ServeRewardConfig
from keel.data.batches import Rollouts
from keel.data.prompts import Prompt
from keel.errors import RewardError
from keel.rollout.score_check import NoScore, Score
from keel.rollout.scorers import RewardModelScorer, Scorer, build_scorers
from keel.server.limits import LOCAL, Gate, Refused, parse_body, read_body
from keel.terminal import tell

PATH = "/get_reward"
REMEMBERED = 64  # answers, for requests that come again because the first answer was lost
FIELDS = ("query", "prompts", "segments")


class RewardServer:
    """Answers POST /get_reward {"query": [prompt + answer], "prompts": [prompt]} with {"rewards": [number]}, null where
    a reward function says that it does not apply.

    One batch is scored at a time; at most `max_waiting` others wait. Other lists in the body are handed to a Python
    reward function as columns.
    """

    def __init__(self, scorer: Scorer, settings: ServeRewardConfig) -> None:
        self.scorer, self.settings = scorer, settings
        self.turns, self.waiting = ThreadPoolExecutor(1), 0  # who came first is served first
        self.cut = 0  # texts that were too long to be read in full
        self.answers: OrderedDict[bytes, asyncio.Future[list[Score]]] = OrderedDict()

    async def get_reward(self, request: Request) -> Response:
        try:
            body = await read_body(request, self.settings.max_body_mb * 2**20)
            rollouts, segments = parse_score_request(parse_body(body), self.settings.max_rows)
            scores = await self._scores(request.headers.get("idempotency-key"), body, rollouts, segments)
            return JSONResponse({"rewards": [score_as_json(score) for score in scores]})
        except Refused as refused:
            return refused.response()
        except RewardError as error:
            tell(str(error))
            return JSONResponse({"error": str(error)}, 422)

    async def _scores(
        self, key: str | None, body: bytes, rollouts: Rollouts, segments: list[list[str]] | None
    ) -> list[Score]:
        """A request with the key and body of one before gets its answer: nothing is done, or counted, twice."""
        known = sha256(repr(key).encode() + body).digest() if key else None
        if known is not None and known in self.answers:
            return await asyncio.shield(self.answers[known])
        if self.waiting > self.settings.max_waiting:
            raise Refused(503, "too many requests are waiting", {"Retry-After": "1"})
        self.waiting += 1
        task = asyncio.get_running_loop().run_in_executor(self.turns, self._in_turn, rollouts, segments)
        task.add_done_callback(lambda done: self._done(done, known))
        if known is not None:
            self.answers[known] = task
            while len(self.answers) > REMEMBERED:
                self.answers.popitem(last=False)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Future[list[Score]], known: bytes | None) -> None:
        """A failure is not remembered: the next attempt may fare better."""
        self.waiting -= 1
        if known is not None and (task.cancelled() or task.exception() is not None):
            self.answers.pop(known, None)

    def _in_turn(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        with torch.no_grad():
            scores = self.scorer(rollouts, segments)
            self._count_cut()
            return scores

    def _count_cut(self) -> None:
        """Warn at the 1st, 10th, 100th, ... text that was too long for the reward model to read in full."""
        cut = sum(self.scorer.cut or []) if isinstance(self.scorer, RewardModelScorer) else 0
        before, self.cut = self.cut, self.cut + cut
        if len(str(self.cut)) > len(str(before)) or (cut and not before):
            tell(f"{self.cut} texts so far were longer than the reward model can read and lost their beginning")


def reward_app(settings: ServeRewardConfig, token: str) -> Starlette:
    """The application. Raises ConfigError when the scorer cannot be loaded."""
    server = RewardServer(build_scorers([settings.source])[0], settings)
    hosts = (*LOCAL, settings.host, *settings.names)
    gate = Middleware(Gate, token=token, hosts=hosts, port=settings.port)
    return Starlette(routes=[Route(PATH, server.get_reward, methods=["POST"])], middleware=[gate])


def parse_score_request(body: Any, max_rows: int) -> tuple[Rollouts, list[list[str]] | None]:
    """The answers to be judged, and their segments if given. Raises Refused for what does not fit the contract."""
    if not isinstance(body, Mapping) or not texts(body.get("query")):
        raise Refused(400, 'expected {"query": [text, ...], "prompts": [text, ...]}')
    queries = body["query"]
    prompts = body.get("prompts", [""] * len(queries))
    if not texts(prompts) or len(prompts) != len(queries):
        raise Refused(400, f'expected {len(queries)} texts in "prompts", as many as in "query"')
    if len(queries) > max_rows:
        raise Refused(413, f"{len(queries)} answers are more than {max_rows}")
    apart = [
        row for row, (query, prompt) in enumerate(zip(queries, prompts, strict=True)) if not query.startswith(prompt)
    ]
    if apart:
        raise Refused(400, f"query {apart[0]} does not begin with its prompt")
    answers = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    columns = {name: values for name, values in body.items() if name not in FIELDS}
    odd = [name for name, values in columns.items() if not isinstance(values, list) or len(values) != len(queries)]
    if odd:
        raise Refused(400, f'expected a list of {len(queries)} values in "{odd[0][:80]}"')
    rows = [
        Prompt(prompt, prompt, (), {name: values[row] for name, values in columns.items()})
        for row, prompt in enumerate(prompts)
    ]
    nothing = torch.zeros(len(rows), 0)
    none = nothing.bool()
    rollouts = Rollouts(
        rows, nothing.long(), none, nothing.long(), none, nothing, torch.zeros(len(rows)).bool(), answers
    )
    return rollouts, parse_segments(body.get("segments"), answers)


def parse_segments(segments: Any, answers: list[str]) -> list[list[str]] | None:
    if segments is None:
        return None
    if (
        not isinstance(segments, list)
        or not all(map(texts, segments))
        or ["".join(parts) for parts in segments] != answers
    ):
        raise Refused(400, '"segments" must be lists of texts that join to the answers')
    return segments


def texts(value: Any) -> bool:
    """A list of at least one text, and of nothing else."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def score_as_json(score: Score) -> Any:
    """Raises RewardError for what is no score."""
    if isinstance(score, NoScore):
        raise RewardError(score.reason)
    return score
