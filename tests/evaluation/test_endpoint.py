"""A policy behind an OpenAI-compatible address in `keel sample` and `keel evaluate`."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import GPT2Config

from keel.config import EvaluateConfig, SampleConfig, parse
from keel.endpoints.client import POLICY_KEY, EndpointClient
from keel.errors import ConfigError, KeelError
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.sample import sample_responses

from ..chat_tokenizer import chat_tokenizer
from ..runs import PROMPTS, share_of_w3


class Endpoint:
    """A model that writes as many w3 as the last digit of the seed; it keeps what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.replies: list[Response] = []  # to give before any response
        self.changes: dict[str, Any] = {}
        self.url = ""

    async def complete(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("Authorization", ""))
        if self.replies:
            return self.replies.pop()
        count = 1 + self.bodies[-1]["seed"] % 4
        text = " w3" * count
        is_chat = request.url.path.endswith("chat/completions")
        content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        choice = {"index": 0, "finish_reason": "stop", **content}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": count + 1}} | self.changes)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    served = Endpoint()
    routes = [Route(f"/v1/{path}", served.complete, methods=["POST"]) for path in ("completions", "chat/completions")]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        served.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield served
        server.should_exit = True
        thread.join()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


def sampled(endpoint: Endpoint, reader: Path, file: Path, tmp_path: Path, **others: Any) -> list[list[str]]:
    output = tmp_path / "responses.jsonl"
    values = {
        "model": f"{endpoint.url}#big",
        "tokenizer": str(reader),
        "prompts": {"path": str(file)},
        "output": str(output),
        "sampling": {"num_responses": 2, "batch_size": 3},
    }
    sample_responses(parse(SampleConfig, values | others))
    return [json.loads(line)["responses"] for line in output.read_text().splitlines()]


def test_sample(endpoint: Endpoint, tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    responses = sampled(endpoint, tiny_policy, prompts, tmp_path)
    assert [len(each) for each in responses] == [2] * 4
    assert {(body["model"], body["max_tokens"], body["temperature"]) for body in endpoint.bodies} == {("big", 64, 1.0)}
    assert sorted(body["prompt"] for body in endpoint.bodies) == sorted(PROMPTS * 2)
    assert len({body["seed"] for body in endpoint.bodies}) == 8
    assert sampled(endpoint, tiny_policy, prompts, tmp_path) == responses


def test_a_chat_is_sent_as_messages(endpoint: Endpoint, prompts: Path, tmp_path: Path) -> None:
    chat_tokenizer().save_pretrained(tmp_path / "chat")
    GPT2Config().save_pretrained(tmp_path / "chat")
    settings = {"path": str(prompts), "chat": True, "system": "Be kind."}
    sampled(endpoint, tmp_path / "chat", prompts, tmp_path, prompts=settings)
    assert endpoint.bodies[0]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert endpoint.bodies[0]["messages"][1]["role"] == "user"


def test_evaluate_compares_it_with_a_policy(
    endpoint: Endpoint, tiny_policy: Path, prompts: Path, tmp_path: Path
) -> None:
    values = {
        "policy": str(tiny_policy),
        "against": f"{endpoint.url}#big",
        "prompts": {"path": str(prompts)},
        "sampling": {"num_responses": 4, "max_response_tokens": 8},
        "output": str(tmp_path / "evaluation.json"),
        "best_of": 2,
    }
    metrics = evaluate_policies(parse(EvaluateConfig, values), [share_of_w3])
    assert metrics["against"]["score"] == 1.0
    assert metrics["win_rate"] < 0.2
    assert 2 <= metrics["against"]["length"] <= 5  # as the endpoint counts tokens
    assert not {"kl", "entropy"} & metrics["against"].keys()
    assert "entropy" in metrics["policy"]
    alone = evaluate_policies(
        parse(
            EvaluateConfig, values | {"policy": f"{endpoint.url}#big", "against": None, "tokenizer": str(tiny_policy)}
        ),
        [share_of_w3],
    )
    assert alone["policy"]["score"] == 1.0


def test_the_key_is_sent_and_written_nowhere(
    endpoint: Endpoint, tiny_policy: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POLICY_KEY, "s3cret")
    sampled(endpoint, tiny_policy, prompts, tmp_path)
    assert set(endpoint.keys) == {"Bearer s3cret"}
    assert all(b"s3cret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_temporary_failures_are_tried_again(
    endpoint: Endpoint, tiny_policy: Path, prompts: Path, tmp_path: Path
) -> None:
    endpoint.replies = [Response(status_code=503), Response(status_code=429, headers={"Retry-After": "0"})]
    assert len(sampled(endpoint, tiny_policy, prompts, tmp_path)) == 4
    assert len(endpoint.bodies) == 10


def test_a_server_that_is_not_there_ends_at_the_deadline() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(KeelError, match="no reply within 1 s"):
            EndpointClient(url, "m", deadline_seconds=1.0).complete([{"prompt": "x"}])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"choices": []}, "no text"),
        ({"usage": None}, "no text"),
        ({"choices": [{"text": None, "finish_reason": "stop"}]}, "no text"),
        ({"choices": [{"text": "w3", "finish_reason": "content_filter"}]}, "content_filter"),
    ],
)
def test_a_reply_without_a_response_is_refused(
    changes: dict[str, Any], what: str, endpoint: Endpoint, tiny_policy: Path, prompts: Path, tmp_path: Path
) -> None:
    endpoint.changes = changes
    with pytest.raises(KeelError, match=what):
        sampled(endpoint, tiny_policy, prompts, tmp_path)
    assert not (tmp_path / "responses.jsonl").exists()


@pytest.mark.parametrize(
    ("status", "fix"), [(401, POLICY_KEY), (404, "address"), (302, "address")], ids=["no key", "no model", "redirect"]
)
def test_a_refusal_is_named(
    status: int, fix: str, endpoint: Endpoint, tiny_policy: Path, prompts: Path, tmp_path: Path
) -> None:
    endpoint.replies = [Response(status_code=status, headers={"Location": "http://127.0.0.1:1/"}) for _ in range(9)]
    with pytest.raises(KeelError, match=f"HTTP {status}") as caught:
        sampled(endpoint, tiny_policy, prompts, tmp_path)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("others", "where"),
    [
        ({"model": "http://127.0.0.1:1/v1"}, "http://127.0.0.1:1/v1"),
        ({"tokenizer": None}, "tokenizer"),
        ({"sampling": {"top_k": 5}}, "sampling.top_k"),
        ({"model": "http://user:hunter2@127.0.0.1/v1#m"}, "http://127.0.0.1/v1"),
        ({"model": "http://127.0.0.1/v1?key=hunter2#m"}, "http://127.0.0.1/v1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    others: dict[str, Any], where: str, endpoint: Endpoint, tiny_policy: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        sampled(endpoint, tiny_policy, prompts, tmp_path, **others)
    assert caught.value.where == where
    assert "hunter2" not in str(caught.value)


def test_a_key_is_not_sent_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POLICY_KEY, "s3cret")
    with pytest.raises(ConfigError, match="unencrypted"):
        EndpointClient("http://example.org/v1", "m")
    EndpointClient("https://example.org/v1", "m")


def test_a_link_local_address_is_refused() -> None:
    with pytest.raises(KeelError, match="link-local"):
        EndpointClient("http://169.254.169.254/v1", "m", 5.0).complete([{"prompt": "x"}])
