"""A scorer behind HTTP, against a server that behaves, misbehaves and recovers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from keel.config import RewardSource
from keel.data.batches import ScoredRollouts
from keel.errors import ConfigError, RewardError
from keel.rollout.score import score
from keel.rollout.scorers import build_scorers

from .answers import words

TOKENIZER, THREE = words("fine", "not so fine", "fine fine")
Reply = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Server:
    """Gives the replies one after the other, the last one again and again."""

    replies: list[Reply] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    url: str = ""

    def scores(self, timeout_seconds: float = 20.0, **settings: Any) -> ScoredRollouts:
        source = RewardSource(url=self.url, timeout_seconds=timeout_seconds)
        return score(THREE, build_scorers([source]), TOKENIZER, **settings)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = state.replies[0] if len(state.replies) == 1 else state.replies.pop(0)
            reply(self)

        def log_message(self, *_: Any) -> None:
            """No noise."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/get_reward"
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def says(body: str, status: int = 200, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return reply


def drips(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then: no single read takes long, the whole takes for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(300):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass  # the other side has hung up, as it should


GOOD = says('{"rewards": [1.5, -1, 0.25]}')


def test_the_contract(server: Server) -> None:
    server.replies = [GOOD]
    scored = server.scores()
    assert scored.scores.tolist() == [1.5, -1.0, 0.25]
    assert list(scored.by_scorer) == ["get_reward"]
    assert server.asked == [
        {"query": ["Say: fine", "Say: not so fine", "Say: fine fine"], "prompts": ["Say:", "Say:", "Say:"]}
    ]


def test_segments_are_sent_and_scored(server: Server) -> None:
    server.replies = [says('{"rewards": [[1], [2, 3], [4]]}')]
    scored = server.scores(segments="so")
    assert server.asked[0]["segments"] == [[" fine"], [" not so", " fine"], [" fine fine"]]
    assert scored.segment_scores is not None
    assert scored.segment_scores.tolist() == [[0, 1, 0, 0], [0, 2, 0, 3], [0, 0, 4, 0]]


def test_failures_that_pass(server: Server) -> None:
    server.replies = [says("", 500), says("", 503), GOOD]
    assert server.scores().scores.tolist() == [1.5, -1.0, 0.25]
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[1] == server.asked[2]


def test_failures_that_stay_end_at_the_deadline(server: Server) -> None:
    server.replies = [says("", 500)]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no reply within 1 s \(\d attempts; last: .*\) -> start the server"):
        server.scores(timeout_seconds=1.0)
    assert time.monotonic() - start < 15


def test_nobody_listens() -> None:
    source = RewardSource(url="http://127.0.0.1:9/", timeout_seconds=1.0)  # the port of "discard"
    with pytest.raises(RewardError, match=r"no reply within 1 s \(\d attempts; last: ConnectError"):
        score(THREE, build_scorers([source]), TOKENIZER)


def test_a_slow_drip_ends_at_the_deadline(server: Server) -> None:
    server.replies = [drips]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no reply within 0.5 s"):
        server.scores(timeout_seconds=0.5)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (says("", 404), "HTTP 404"),
        (says("", 302, Location="http://127.0.0.1:9/"), "HTTP 302"),
        (says("<html>sorry</html>"), "the reply of the server is not JSON"),
        (says('{"scores": [1, 2, 3]}'), 'the reply of the server has no field "rewards"'),
        (says("[1, 2, 3]"), 'the reply of the server has no field "rewards"'),
        (says('{"rewards": [1, 2]}'), "expected 3 rewards, got 2"),
        (says('{"rewards": "1, 2, 3"}'), "expected a list of rewards, got str"),
        (says('{"rewards": [1, NaN, 2]}'), r"reward nan is not a finite number: sample 1 \(' not so fine'\)"),
        (says('{"rewards": [1, 2, "3"]}'), r"reward '3' is not a finite number: sample 2 \(' fine fine'\)"),
        (says("{}", **{"Content-Encoding": "gzip"}), "the reply of the server is compressed"),
    ],
)
def test_what_no_other_attempt_would_cure_fails_at_once(server: Server, reply: Reply, message: str) -> None:
    server.replies = [reply]
    with pytest.raises(RewardError, match=message):
        server.scores()
    assert len(server.asked) == 1


def test_an_answer_without_end_is_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.rollout.http_scorer.MAX_RESPONSE_BYTES", 1000)
    server.replies = [says(" " * 5000)]
    with pytest.raises(RewardError, match="the reply of the server is larger than 1000 bytes"):
        server.scores()


def test_dropped_instead_of_stopped(server: Server) -> None:
    server.replies = [says("", 404)]
    assert server.scores(on_failure="drop").kept.tolist() == [False, False, False]


@pytest.mark.parametrize("url", ["ftp://host/", "localhost:5000", "http://host:port/"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{url}' is not an http\(s\) address"):
        build_scorers([RewardSource(url=url)])
