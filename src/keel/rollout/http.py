"""A scorer that lives in another process, behind HTTP."""

import time
from typing import Any

import httpx

from keel.data.batches import Rollouts
from keel.errors import ConfigError, RewardError
from keel.rollout.scores import Score, checked

MAX_RESPONSE_BYTES = 8 * 2**20
RETRYABLE = {408, 425, 429, 500, 502, 503, 504}


class HttpScorer:
    """A server: POST {"query": [prompt + answer], "prompts": [prompt]} -> {"rewards": [number]}."""

    def __init__(self, url: str, name: str, weight: float, noisy: bool, timeout_seconds: float) -> None:
        try:
            known = httpx.URL(url).scheme in ("http", "https")
        except httpx.InvalidURL:
            known = False
        if not known:
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
            except httpx.DecodingError as error:
                raise RewardError("the answer cannot be decoded", where=self.url) from error
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
