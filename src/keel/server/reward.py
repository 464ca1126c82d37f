"""A scorer behind HTTP, with the contract of `rewards: [{url: ...}]`, which is OpenRLHF's."""

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
from keel.server.limits import LOCAL, Refused, TokenGate, parse_body, read_body
from keel.terminal import print_line

PATH = "/get_reward"
MAX_KEPT = 64  # batches of scores, for requests that are repeated because the first response was lost
FIELDS = ("query", "prompts", "segments")


class RewardServer:
    """Endpoint of POST /get_reward.

    The request is {"query": [prompt + response], "prompts": [prompt]}, the reply {"rewards": [number]}. A reward is
    null if a reward function does not apply. Other lists in the body are passed to a Python reward function as columns.

    One batch is scored at a time; at most `max_waiting` others wait.
    """

    def __init__(self, scorer: Scorer, settings: ServeRewardConfig) -> None:
        self.scorer, self.settings = scorer, settings
        self.executor, self.waiting = ThreadPoolExecutor(1), 0  # one thread: batches are scored in order of arrival
        self.truncated = 0  # texts so far that were longer than the reward model can read
        self.kept: OrderedDict[bytes, asyncio.Future[list[Score]]] = OrderedDict()

    async def get_reward(self, request: Request) -> Response:
        try:
            body = await read_body(request, self.settings.max_body_mb * 2**20)
            rollouts, segments = parse_score_request(parse_body(body), self.settings.max_rows)
            scores = await self._scores(request.headers.get("idempotency-key"), body, rollouts, segments)
            return JSONResponse({"rewards": [score_as_json(score) for score in scores]})
        except Refused as refused:
            return refused.response()
        except RewardError as error:
            print_line(str(error))
            return JSONResponse({"error": str(error)}, 422)

    async def _scores(
        self, key: str | None, body: bytes, rollouts: Rollouts, segments: list[list[str]] | None
    ) -> list[Score]:
        """Score a batch. A request with the key and body of an earlier one gets its scores, and is not scored twice."""
        digest = sha256(repr(key).encode() + body).digest() if key else None
        if digest is not None and digest in self.kept:
            return await asyncio.shield(self.kept[digest])
        if self.waiting > self.settings.max_waiting:
            raise Refused(503, "too many requests are waiting", {"Retry-After": "1"})
        self.waiting += 1
        task = asyncio.get_running_loop().run_in_executor(self.executor, self._score, rollouts, segments)
        task.add_done_callback(lambda done: self._on_done(done, digest))
        if digest is not None:
            self.kept[digest] = task
            while len(self.kept) > MAX_KEPT:
                self.kept.popitem(last=False)
        # Shielded: a client that disconnects must not cancel scores that another request may wait for.
        return await asyncio.shield(task)

    def _on_done(self, task: asyncio.Future[list[Score]], digest: bytes | None) -> None:
        self.waiting -= 1
        if digest is not None and (task.cancelled() or task.exception() is not None):
            self.kept.pop(digest, None)  # a repeated request is scored again after a failure

    def _score(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        with torch.no_grad():
            scores = self.scorer(rollouts, segments)
            self._count_truncated()
            return scores

    def _count_truncated(self) -> None:
        """Warn at the 1st, 10th, 100th, ... text that was too long for the reward model."""
        truncated = sum(self.scorer.cut or []) if isinstance(self.scorer, RewardModelScorer) else 0
        previous, self.truncated = self.truncated, self.truncated + truncated
        if len(str(self.truncated)) > len(str(previous)) or (truncated and not previous):
            print_line(
                f"{self.truncated} texts so far were longer than the reward model can read and lost their beginning"
            )


def reward_app(settings: ServeRewardConfig, token: str) -> Starlette:
    """Build the application. Raises ConfigError if the scorer cannot be loaded."""
    server = RewardServer(build_scorers([settings.source])[0], settings)
    hosts = (*LOCAL, settings.host, *settings.names)
    gate = Middleware(TokenGate, token=token, hosts=hosts, port=settings.port)
    return Starlette(routes=[Route(PATH, server.get_reward, methods=["POST"])], middleware=[gate])


def parse_score_request(body: Any, max_rows: int) -> tuple[Rollouts, list[list[str]] | None]:
    """Convert a request body to rollouts of text alone, and their segments if there are any.

    Raises Refused for a body that does not follow the contract.
    """
    if not isinstance(body, Mapping) or not is_text_list(body.get("query")):
        raise Refused(400, 'expected {"query": [text, ...], "prompts": [text, ...]}')
    queries = body["query"]
    prompts = body.get("prompts", [""] * len(queries))
    if not is_text_list(prompts) or len(prompts) != len(queries):
        raise Refused(400, f'expected {len(queries)} texts in "prompts", as many as in "query"')
    if len(queries) > max_rows:
        raise Refused(413, f"{len(queries)} responses are more than {max_rows}")
    mismatched = [
        row for row, (query, prompt) in enumerate(zip(queries, prompts, strict=True)) if not query.startswith(prompt)
    ]
    if mismatched:
        raise Refused(400, f"query {mismatched[0]} does not begin with its prompt")
    responses = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    columns = {name: values for name, values in body.items() if name not in FIELDS}
    invalid = [name for name, values in columns.items() if not isinstance(values, list) or len(values) != len(queries)]
    if invalid:
        raise Refused(400, f'expected a list of {len(queries)} values in "{invalid[0][:80]}"')
    rows = [
        Prompt(prompt, prompt, (), {name: values[row] for name, values in columns.items()})
        for row, prompt in enumerate(prompts)
    ]
    no_floats = torch.zeros(len(rows), 0)
    no_flags = no_floats.bool()
    # Scorers of text read prompts and responses only, so the tensors are empty.
    rollouts = Rollouts(
        rows,
        no_floats.long(),
        no_flags,
        no_floats.long(),
        no_flags,
        no_floats,
        torch.zeros(len(rows)).bool(),
        responses,
    )
    return rollouts, parse_segments(body.get("segments"), responses)


def parse_segments(segments: Any, responses: list[str]) -> list[list[str]] | None:
    """Check that the segments of each response join to it. Raises Refused."""
    if segments is None:
        return None
    if (
        not isinstance(segments, list)
        or not all(map(is_text_list, segments))
        or ["".join(texts) for texts in segments] != responses
    ):
        raise Refused(400, '"segments" must be lists of texts that join to the responses')
    return segments


def is_text_list(value: Any) -> bool:
    """Return whether this is a list of at least one text, and of texts only."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def score_as_json(score: Score) -> Any:
    """Return the score as a JSON value. Raises RewardError if the scorer gave none for a response."""
    if isinstance(score, NoScore):
        raise RewardError(score.reason)
    return score
