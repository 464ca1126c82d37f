"""F-30, F-33, F-34, F-37, F-38: the reward server that keel ships, against everything but a good request."""

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from keel.config import RewardSource, ServeRewardConfig, parse
from keel.errors import ConfigError
from keel.models.reward_model import RewardModel
from keel.rollout.score import score
from keel.rollout.scorers import build_scorers
from keel.server.limits import prompt_server
from keel.server.reward import PATH, reward_app

from ..rollout.answers import words
from .flooding import is_over

TOKEN = "0123456789abcdef"
FUNCTION = '''
calls = []

def counted(prompts, completions, style=None, **_):
    """The number of words, and one more for each in a good style."""
    calls.append(completions)
    if completions[0] == " fail":
        raise RuntimeError("inside the function")
    extra = [int(each == "good") for each in style] if style else [0] * len(prompts)
    return [len(text.split()) + more for text, more in zip(completions, extra)]
'''
SLOW = """
import time

def f(completions, **_):
    time.sleep(0.5)
    return [0.0] * len(completions)
"""
GOOD = {"query": ["Say: one two", "Say: three"], "prompts": ["Say:", "Say:"]}


@pytest.fixture
def app(tmp_path: Path) -> Any:
    (tmp_path / "mine.py").write_text(FUNCTION)
    return reward_app(ServeRewardConfig(function=f"{tmp_path / 'mine.py'}:counted", max_rows=100, max_body_mb=1), TOKEN)


@pytest.fixture
def client(app: Any) -> Iterator[TestClient]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(app, "http://127.0.0.1:5000", raise_server_exceptions=True, headers=headers) as client:
        yield client


def test_the_contract(client: TestClient) -> None:
    answer = client.post(PATH, json=GOOD)
    assert (answer.status_code, answer.json()) == (200, {"rewards": [2.0, 1.0]})
    answer = client.post(PATH, json={"query": ["one two", "three"]})
    assert answer.json() == {"rewards": [2.0, 1.0]}
    answer = client.post(PATH, json={**GOOD, "style": ["good", "bad"]})
    assert answer.json() == {"rewards": [3.0, 1.0]}


def test_a_reward_model_is_served_with_its_own_scores(tiny_policy: Path, tmp_path: Path) -> None:
    trained = RewardModel.load(str(tiny_policy), template="{prompt}{response}")
    torch.nn.init.normal_(trained.head.weight)
    trained.save(tmp_path / "model")
    settings = ServeRewardConfig(model=str(tmp_path / "model"))
    expected = build_scorers([settings.source])[0]
    tokenizer, rollouts = words("fine", "not so fine", "fine fine")
    with TestClient(reward_app(settings, TOKEN), "http://localhost:5000") as client:
        prompts = [prompt.text for prompt in rollouts.prompts]
        body = {"query": [p + text for p, text in zip(prompts, rollouts.texts, strict=True)], "prompts": prompts}
        answer = client.post(f"{PATH}?token={TOKEN}", json=body)
    assert answer.json()["rewards"] == score(rollouts, [expected], tokenizer).scores.tolist()


BODIES: dict[str, tuple[Any, int]] = {
    "a list": ([1], 400),
    "nothing to score": ({}, 400),
    "no answers": ({"query": []}, 400),
    "a number": ({"query": [1]}, 400),
    "too few prompts": ({"query": ["a", "b"], "prompts": ["a"]}, 400),
    "another prompt": ({"query": ["ab"], "prompts": ["b"]}, 400),
    "a column too short": ({"query": ["a", "b"], "style": ["x"]}, 400),
    "too many": ({"query": ["a"] * 101}, 413),
    "segments that do not join": ({"query": ["a b"], "prompts": [""], "segments": [["a", "b"]]}, 400),
    "a function that fails": ({"query": ["Say: fail"], "prompts": ["Say:"]}, 422),
}


@pytest.mark.parametrize("name", list(BODIES))
def test_f38_bad_input_gets_a_reason(name: str, client: TestClient) -> None:
    body, status = BODIES[name]
    answer = client.post(PATH, json=body)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"query": [NaN]}', "application/json", 400),
        (b'{"query": ["a"], "\\ud800": 1}', "application/json", 400),
        (b"[" * 200_000, "application/json", 400),
        (json.dumps(GOOD).encode(), "text/plain", 415),
        (json.dumps(GOOD).encode(), "application/x-www-form-urlencoded", 415),
        (b" " * (2**20 + 1), "application/json", 413),
    ],
)
def test_f38_bodies_that_are_no_json(content: bytes, kind: str, status: int, client: TestClient) -> None:
    assert client.post(PATH, content=content, headers={"Content-Type": kind}).status_code == status


@pytest.mark.parametrize("token", ["", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "☃"])
def test_f34_only_with_the_token(token: str, app: Any) -> None:
    with TestClient(app, "http://127.0.0.1:5000") as client:
        assert client.post(PATH, json=GOOD, params={"token": token}).status_code == 401
        assert client.post(PATH, json=GOOD, headers={"Authorization": f"Bearer {token}".encode()}).status_code == 401
        assert client.post(PATH, json=GOOD, headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401


HOSTS = ["evil.com", "evil.com:5000", "localhost.evil.com:5000", "127.0.0.1", "127.0.0.1:80", "0.0.0.0:5000",
         "[::]:5000", "localhost:5000@evil.com", "127.0.0.1:5000.evil.com", "", "localhost:5000, evil.com"]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_f33_only_under_its_own_name(host: str, client: TestClient) -> None:
    assert client.post(PATH, json=GOOD, headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["LOCALHOST:5000", "[::1]:5000", "127.0.0.1:5000"])
def test_f33_its_own_names(host: str, client: TestClient) -> None:
    assert client.post(PATH, json=GOOD, headers={"Host": host}).status_code == 200


PATHS = ["/", "/get_reward/", "/get_reward/..", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//get_reward",
         "/static/../../etc/passwd", "/C:/windows", "/get_reward%00", "/docs", "/openapi.json"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_f30_there_is_nothing_else(path: str, client: TestClient) -> None:
    assert client.get(path, follow_redirects=False).status_code in (404, 405, 307)
    assert client.get(PATH).status_code == 405


def test_f15_a_request_that_comes_again_is_scored_once(app: Any, client: TestClient) -> None:
    function = app.routes[0].endpoint.__self__.scorer.function
    for key, body in (("a", GOOD), ("a", GOOD), ("b", GOOD), ("a", {"query": ["other"]})):
        assert client.post(PATH, json=body, headers={"Idempotency-Key": key}).status_code == 200
    assert len(function.__globals__["calls"]) == 3


def test_f15_a_failure_is_not_remembered(client: TestClient, app: Any) -> None:
    calls = app.routes[0].endpoint.__self__.scorer.function.__globals__["calls"]
    for number in (1, 2):
        assert client.post(PATH, json={"query": [" fail"]}, headers={"Idempotency-Key": "a"}).status_code == 422
        assert len(calls) == number


def test_f33_the_name_that_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTION)
    with pytest.raises(ConfigError, match=r"host 0\.0\.0\.0 needs names"):
        parse(ServeRewardConfig, {"function": "f.py:f", "host": "0.0.0.0"})
    settings = ServeRewardConfig(function=f"{tmp_path / 'mine.py'}:counted", host="0.0.0.0", names=["10.0.0.5", "Box"])
    with TestClient(reward_app(settings, TOKEN), "http://box:5000") as client:
        found = [client.post(f"{PATH}?token={TOKEN}", json=GOOD, headers={"Host": f"{host}:5000"}).status_code
                 for host in ("10.0.0.5", "BOX", "0.0.0.0", "10.0.0.6")]  # fmt: skip
    assert found == [200, 200, 200, 400]


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """The server as `keel serve-reward` starts it, at a free port."""
    (folder / "mine.py").write_text(FUNCTION)
    with socket.create_server(("127.0.0.1", 0)) as place:
        port: int = place.getsockname()[1]
        app = reward_app(ServeRewardConfig(function=f"{folder / 'mine.py'}:counted", port=port), TOKEN)
        server = prompt_server(app, 20)
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        yield port
        server.should_exit = True
        thread.join(10)


def test_f37_silent_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.server.limits.HEADER_SECONDS", 0.5)
    with serving(tmp_path) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        for slow in silent[:15]:
            slow.sendall(b"POST /get_reward HTTP/1.1\r\nHost: ")
        time.sleep(1.5)
        answer = httpx.post(f"http://127.0.0.1:{port}{PATH}?token={TOKEN}", json=GOOD, timeout=10)
        assert answer.json() == {"rewards": [2.0, 1.0]}
        for connection in silent:
            connection.settimeout(5)
            assert is_over(connection)


def test_f37_more_than_may_wait_are_sent_away(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\ndef f(completions, **_):\n    time.sleep(0.5)\n    return [0.0] * len(completions)\n"
    )
    settings = ServeRewardConfig(function=f"{tmp_path / 'slow.py'}:f", max_waiting=2)
    found: list[int] = []

    def ask() -> None:
        found.append(client.post(PATH, json=GOOD).status_code)

    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(reward_app(settings, TOKEN), "http://127.0.0.1:5000", headers=headers) as client:
        threads = [
            threading.Thread(target=lambda: found.append(client.post(PATH, json=GOOD).status_code)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(set(found)) == [200, 503]
    assert 2 <= found.count(200) <= 4


def test_f34_an_address_for_others_must_be_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from keel.cli import serve_reward

    (tmp_path / "mine.py").write_text(FUNCTION)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from other machines"):
        serve_reward.run(["--function", f"{tmp_path / 'mine.py'}:counted", "--host", "0.0.0.0", "--names", "box"])
    assert capsys.readouterr().out == ""


def mutated(draw: random.Random) -> bytes:
    """A body near a good one: values of another kind, missing and strange fields, flipped and cut bytes."""
    strange = [None, True, 1, -1e300, "", "\x00", "\ud83d\ude00", [], {}, [[]], "a" * 1000, {"query": 1}, [None]]
    body: dict[str, Any] = json.loads(json.dumps(GOOD))
    for _ in range(draw.randrange(3)):
        key = draw.choice(["query", "prompts", "segments", "style", "", "__proto__", "rewards"])
        value = draw.choice([*strange, body.get("query"), [draw.choice(strange) for _ in range(2)]])
        body[key] = value
        if draw.random() < 0.2:
            body.pop(draw.choice(list(body)))
    data = bytearray(json.dumps(body).encode())
    for _ in range(draw.choice([0, 0, 1, 3])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.1 else data)


@pytest.mark.slow
def test_f38_ten_thousand_bodies(client: TestClient) -> None:
    draw, seen = random.Random(0), set()
    began = time.monotonic()
    for _ in range(10_000):
        answer = client.post(PATH, content=mutated(draw), headers={"Content-Type": "application/json"})
        seen.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        assert "Traceback" not in answer.text
        assert list(answer.json()) == (["rewards"] if answer.status_code == 200 else ["error"])
    assert {200, 400} <= seen
    assert time.monotonic() - began < 300


def test_the_client_of_keel_train_speaks_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, rollouts = words("fine", "not so fine", "fine fine")
    monkeypatch.setenv("KEEL_REWARD_TOKEN", TOKEN)
    with serving(tmp_path) as port:
        scorer = build_scorers([RewardSource(url=f"http://127.0.0.1:{port}{PATH}", timeout_seconds=20)])
        assert score(rollouts, scorer, tokenizer).scores.tolist() == [1.0, 3.0, 2.0]


def test_f37_who_came_first_is_served_first(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\nseen = []\n\ndef f(completions, **_):\n    seen.append(completions[0])\n    time.sleep(0.02)\n"
        "    return [float(len(seen))] * len(completions)\n"
    )
    app = reward_app(ServeRewardConfig(function=f"{tmp_path / 'mine.py'}:f", max_waiting=64), TOKEN)

    async def together() -> list[float]:
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:5000", headers=headers) as client:
            asked = []
            for number in range(24):
                body = {"query": [f"Say: {number}"], "prompts": ["Say:"]}
                asked.append(asyncio.create_task(client.post(PATH, json=body)))
                await asyncio.sleep(0.005)
            return [(await each).json()["rewards"][0] for each in asked]

    assert asyncio.run(together()) == [float(place) for place in range(1, 25)]
